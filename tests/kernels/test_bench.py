"""What of the benchmarks can run without a GPU: alternatives compute what the definitions say, the runner alternates, results become verdicts."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.cases import operations
from bench.gates import compiled, cubin, nvcc
from bench.measuring import operations as runner
from bench.measuring import record
from bench.measuring.ceilings import Ceilings, measure_ceilings
from bench.sides import plain_operations
from bench.tables import verified
from bench.tables.rows import read_all
from smi import console, files
from smi.kernels import comparison, timing, versions
from smi.kernels.verification import VERIFIED

CPU = torch.device("cpu")
SMALL = operations.Sizes(heads=2, head_width=8, hidden=32, image=64, patch=16)


@pytest.fixture
def small():
    """A case of every builder, small."""
    by_tokens = [operations.attention_case, operations.cls_case, operations.norm_case, operations.gelu_case, operations.residual_case]
    cases = [make(5, 2, SMALL) for make in by_tokens]
    cases += [operations.embed_case(4, 2, SMALL), operations.step_case(16, 2, SMALL), operations.tv_case(2, SMALL)]
    return {case.name: case for case in cases}


def test_alternatives_compute_what_the_definitions_say(small):
    """In float64, results and gradients; the step with every patch active, because research code steps all pixels."""
    for name, case in small.items():
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


def test_runner_measures_what_is_correct_and_says_why_not_the_rest(small, monkeypatch):
    case = replace(small["layer_norm 2x5 tokens"], dtype=torch.float32, others={"eager": plain_operations.layer_norm, "broken": lambda **_: 1 / 0})
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


def test_rounds_alternate():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = timing.alternate(runs, CPU, rounds=4, before=lambda: order.append("flush"))
    assert [name for name in order if name != "flush"] == list("abbaabba")
    assert order[:2] == ["flush", "a"]
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4}


def test_samples_last_about_as_long_as_asked():
    calls = []
    timing.alternate({"a": lambda: calls.append(0)}, CPU, rounds=2, sample_seconds=1e-4)
    assert len(calls) > 20  # many short calls to a sample, not one


def test_quantiles():
    assert timing.quantiles([3.0]) == (3, 3, 3)
    assert timing.quantiles([float(i) for i in range(11)]) == (2, 5, 8)
    assert timing.quantiles([2.0, 1.0]) == pytest.approx((1.2, 1.5, 1.8))


def test_share_is_of_the_longer_floor(small):
    case = replace(small["linear_gelu 2x5 tokens"], bytes=1000, flops=10)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_whole_run_on_the_cpu(small, monkeypatch, tmp_path, capsys):
    """All that `python -m bench.gpu` does, on small shapes, the Triton kernels interpreted: verdicts and cases in the file, tables printed."""
    from smi.kernels.layer_norm import op

    monkeypatch.setattr(op, "example", lambda device, dtype, size: small["layer_norm 2x5 tokens"].build(device, dtype))
    monkeypatch.setattr(gpu, "cases", lambda batch, only: [case for case in small.values() if case.operation in only])
    about = {"device": "Imaginary 1", "dirty": False, "architecture": "sm_90", "commit": "0"}
    monkeypatch.setattr(record, "cuda_environment", lambda device: dict(about))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "measure_ceilings", lambda device: Ceilings(1e9, 1e9))
    assert gpu.measure_operations(CPU, ["layer_norm"], 100.0, compiled=False) == 0
    rows = [json.loads(line) for line in (tmp_path / "imaginary-1.jsonl").read_text().splitlines()]
    verdicts = [row for row in rows if row["kind"] == "verdict"]
    assert [(v["version"], v["dtype"], v["correct"]) for v in verdicts] == [("triton", d, True) for d in ("bfloat16", "float16", "float32")]
    timed = [row for row in rows if row["kind"] == "case" and "not_timed" not in row]
    assert [row["side"] for row in timed if row["side"] != "cpu"] == ["stock", "eager"]
    assert all(row["resolved"] in versions.VERSIONS and len(row["warm_us"]) == 3 and row["commit"] == "0" for row in timed)
    assert verified.table(read_all(tmp_path))["architectures"]["sm_90"][0]["operation"] == "layer_norm"
    assert "layer_norm triton" in capsys.readouterr().out
    assert gpu.measure_operations(CPU, ["layer_norm"], 0.0, compiled=False) == 0
    assert "no time left for layer_norm 2x5 tokens: run again with --only" in capsys.readouterr().out


def test_results_are_appended(tmp_path):
    for i in range(2):
        record.append(tmp_path / "x.jsonl", [{"i": i}])
    assert (tmp_path / "x.jsonl").read_text() == '{"i": 0}\n{"i": 1}\n'


def verdict_row(**changes):
    row = {"kind": "verdict", "dirty": False, "architecture": "sm_90", "operation": "layer_norm", "version": "triton", "dtype": "bfloat16"}
    return row | {"size": "any", "correct": True, "speedup": 1.5, "note": "", "device": "X"} | changes


def test_verified_takes_the_last_clean_verdict(tmp_path):
    rows = [verdict_row(), verdict_row(speedup=2.0), verdict_row(speedup=9.0, dirty=True), {"kind": "case"}, verdict_row(architecture="sm_80")]
    record.append(tmp_path / "x.jsonl", rows[:2])
    record.append(tmp_path / "x.jsonl", rows[2:])
    made = verified.table(read_all(tmp_path))["architectures"]
    assert list(made) == ["sm_80", "sm_90"]
    assert [v["speedup"] for v in made["sm_90"]] == [2.0]


def test_verified_table_is_what_the_result_files_give(capsys):
    assert verified.main(["--check"]) == 0
    assert json.loads(VERIFIED.read_text()) == verified.table(read_all())


def test_results_file_is_named_after_the_device():
    assert record.results_file("NVIDIA H200").name == "nvidia-h200.jsonl"
    assert record.results_file("NVIDIA A100-SXM4-80GB").name == "nvidia-a100-sxm4-80gb.jsonl"


def test_runs_from_the_root_without_installation():
    """Only the checkout on the path, no installed package: smi.kernels is found beside smi."""
    root = Path(__file__).parents[2]
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    code += "import smi.kernels; print(smi.kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.stdout.strip() == str(root / "kernels" / "__init__.py"), done.stderr


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E R5, desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0040*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0070*/                   STL [R1], R2 ;
        /*0080*/               @P1 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   BRA 0x90;
        /*00a0*/                   NOP;
"""


def test_instruction_counts():
    counts = cubin.instruction_counts(SASS)
    assert counts["mma"] == {"HGMMA": 1, "HMMA": 1}
    assert counts["instructions"] == 9
    assert [counts[k] for k in ("loads_128", "loads_other", "async_128", "async_other", "bulk", "spill_ops")] == [1, 1, 1, 0, 1, 1]
    assert [counts[k] for k in ("stores_128", "stores_other")] == [1, 0]


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
"""


def test_report_of_ptxas():
    assert nvcc.parse_report(PTXAS) == {
        "_Z1aPf": {"registers": 32, "stack": 16, "shared": 1024},
        "_Z1bPf": {"registers": 8, "stack": 0, "shared": 0},
    }


def facts(**changes):
    return {"stack": 0, "spill_ops": 0, "shared": 0, "registers": 32} | changes


def gate(versions, **kernels):
    return {"versions": versions, "kernels": {f"layer_norm/{name}": {"sm_80": value} for name, value in kernels.items()}}


def test_gate_fails_on_a_change_with_the_same_compilers_only(capsys):
    before = gate({"triton": "1"}, a=facts(), b=facts())
    assert compiled.check(before, before, None) == 0
    after = gate({"triton": "1"}, a=facts(registers=40), b=facts())
    assert compiled.check(after, before, None) == 1
    assert "layer_norm/a" in capsys.readouterr().out
    assert compiled.check(gate({"triton": "1"}, a=facts()), before, None) == 1  # a kernel that went
    assert compiled.check(gate({"triton": "2"}, a=facts(registers=40), b=facts()), before, None) == 0
    assert "not held against it: compilers are {'triton': '2'}" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "text"), [({"stack": 8}, "spills"), ({"spill_ops": 1}, "spills"), ({"shared": 166913}, "at most fit")])
def test_gate_fails_on_a_spill_whatever_is_committed(change, text, capsys):
    bad = gate({"triton": "9"}, a=facts(**change))
    assert compiled.check(bad, bad, None) == 1
    assert text in capsys.readouterr().out


def test_gate_looks_only_at_what_was_compiled():
    committed = {"versions": {}, "kernels": {"attention/x": {}, "csrc/attention/y": {"sm_80": facts()}, "layer_norm/a": {"sm_80": facts()}}}
    assert not compiled.differences(gate({}, a=facts()), committed, ["layer_norm"])
    assert not compiled.differences(gate({}, a=facts()), committed, None)  # no nvcc here, its kernels are not held against it
    assert compiled.differences(gate({"nvcc": "1"}, a=facts()), committed, None)


def test_gate_file_has_a_line_per_kernel_and_architecture():
    before = gate({"triton": "1"}, b=facts(mma={"HMMA": 4}), a=facts())
    text = compiled.as_text(before["versions"], before["kernels"])
    assert json.loads(text) == before
    assert sum('"sm_80"' in line for line in text.splitlines()) == 2
    assert text.index("layer_norm/a") < text.index("layer_norm/b")


def test_table_without_rich_has_the_same_cells():
    text = console.plain_table("title", ["name", "n"], [["a", "1"], ["bb", "22"]])
    assert text.splitlines() == ["title", "name   n", "a      1", "bb    22"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_text(path, object())
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
