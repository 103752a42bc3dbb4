"""Cases of operations: alternatives compute what the definitions say, only what is correct is timed, rates are held against the roofline."""

from dataclasses import replace

import torch

from bench.cases import operations
from bench.measuring import operations as runner
from bench.measuring.ceilings import Ceilings, measure_ceilings
from bench.sides import plain_operations
from smi.kernels import comparison, versions

CPU = torch.device("cpu")


def test_alternatives_compute_what_the_definitions_say(small_cases):
    """In float64, results and gradients; the step with every patch active, because research code steps all pixels."""
    for name, case in small_cases.items():
        if not versions.exists(case.operation, "triton"):
            continue
        example = case.build(CPU, torch.float64)
        results = comparison.as_tuple(example.reference(**runner.cloned(example)))
        weights = tuple(torch.randn_like(result) for result in results)
        want = comparison.outcome(example.reference, example.arguments, example.inputs, weights, example.mutated)
        for other in ("eager", *(n for n in case.others if n == "sdpa math")):
            got = comparison.outcome(case.others[other], case.plain(example.arguments), example.inputs, weights, example.mutated)
            for key, value in want.items():
                assert comparison.relative_error(got[key], value) < 1e-6, f"{name} {other} {key}"


def test_runner_measures_what_is_correct_and_says_why_not_the_rest(small_cases, monkeypatch):
    case = replace(
        small_cases["layer_norm 2x5 tokens"], dtype=torch.float32, others={"eager": plain_operations.layer_norm, "broken": lambda **_: 1 / 0}
    )
    ceilings = measure_ceilings(CPU, torch.float32, elements=1 << 16, side=64)
    assert min(ceilings) > 0
    measured, refused = runner.measure(case, CPU, ceilings, rounds=3)
    assert [m.side for m in measured if m.side != "cpu"] == ["stock", "eager"]  # C++ where there is a compiler
    assert "ZeroDivisionError" in refused["broken"]
    assert all(0 < m.warm.low <= m.warm.median <= m.warm.high and m.share > 0 for m in measured)
    stock = versions.load("layer_norm", "stock")
    monkeypatch.setattr(stock, "backward", lambda *args: torch.zeros_like(args[2]))
    measured, refused = runner.measure(case, CPU, ceilings, rounds=3)
    assert "stock" not in [m.side for m in measured]  # no timing on a red test
    assert "d_x" in refused["stock"]


def test_share_is_of_the_longer_floor(small_cases):
    case = replace(small_cases["linear_gelu 2x5 tokens"], bytes=1000, flops=10)
    assert runner.roofline_seconds(case, Ceilings(100.0, 10.0)) == 10
    assert runner.roofline_seconds(case, Ceilings(1000.0, 2.0)) == 5
    assert runner.summary(case, "x", [20.0], None, 0, Ceilings(100.0, 10.0)).share == 0.5
    assert runner.summary(case, "x", [20.0], [40.0], 0, Ceilings(100.0, 10.0)).share == 0.25


def test_every_operation_has_a_case_with_an_eager_side():
    for batch in (operations.CPU_BATCH, operations.GPU_BATCH):
        cases = operations.cases(batch)
        assert {case.operation for case in cases} == set(versions.OPERATIONS)
        assert all("eager" in case.others for case in cases)
        assert len({case.name for case in cases}) == len(cases)
        assert {case.operation for case in operations.cases(batch, ["attention"])} == {"attention"}
