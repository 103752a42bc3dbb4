"""Suites, the runner of steps, whole runs and memory, and the published tables, on models small enough for a test."""

import json

import pytest
import timm
import torch

from bench import paper, run
from bench.cases import suites
from bench.measuring import budget, ceilings, inversions, memory, record
from bench.sides import make, ours
from bench.tables import suites as tables
from bench.tables.results import Results
from bench.tables.table import MISSING
from smi.inversion.schedules import make_schedule

CPU = torch.device("cpu")
SMALL = {"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 10}
MODEL = suites.TINY


@pytest.fixture
def small(monkeypatch):
    """DeiTs of two narrow blocks and 16 patches, runs of 28 iterations, little measuring."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **(SMALL | options)))
    monkeypatch.setattr(ceilings, "CPU_SIZES", {"elements": 1 << 12, "side": 32})
    monkeypatch.setattr(inversions, "ITERATIONS", 28)
    monkeypatch.setattr(budget, "MOST_ROUNDS", 1)
    monkeypatch.setattr(memory, "peak_of", lambda side, *_: {"idle_bytes": 1, "peak_above_idle_bytes": 2, "since": "made", "resolved": side})


def test_stages_come_from_the_schedules():
    counts = suites.stage_counts()
    assert counts["dense"] == [196]
    assert counts["SMI"] == [196, 137, 95, 66, 46]
    assert counts["PRI v=7"] == [196, 168, 140, 112, 84, 56, 28]
    measured = {(case.model, case.active or 196) for case in suites.on_cpu().steps}
    assert {(model, n) for model in (suites.TINY, suites.BASE) for stages in counts.values() for n in stages} <= measured


@pytest.mark.parametrize("chosen", [suites.on_cpu(), suites.quick_on_cpu(), suites.on_gpu()], ids=["cpu", "quick", "gpu"])
def test_cases_have_names_of_their_own_and_whole_batches(chosen):
    for cases in (chosen.steps, chosen.scaling, chosen.memory, chosen.whole):
        keys = [(case.name, case.sides) for case in cases]
        assert len(set(keys)) == len(keys)
    for case in chosen.whole:
        schedule = make_schedule(case.method, suites.PATCHES, suites.ITERATIONS, **case.options)
        batches = case.images / (schedule.images_per_trajectory * case.batch)
        assert batches == int(batches) or chosen.whole == suites.on_gpu().whole and -(-batches // 1) == 1
        assert all(len(list(make_schedule(case.method, suites.PATCHES, n, **case.options).stages())) >= 1 for n in case.lengths)


def test_all_suites_write_rows_and_the_paper_reads_them(small, tmp_path, capsys, monkeypatch):
    methods = [(m, o.get("division")) for m, o in suites.METHODS if o.get("division") != 7]
    whole = [suites.WholeCase(MODEL, m, v, 2, 8, (4, 8), ("ours", "eager")) for m, v in methods]
    steps = [suites.StepCase(MODEL, 2, n, ("ours", "eager", "compiled") if n == 5 else suites.TWO_SIDES) for n in (None, 5)]
    compiled = make.compiled.make_step
    plain = make.compiled.PLAIN  # it takes no compiler
    monkeypatch.setattr(make.compiled, "make_step", lambda *args, **options: compiled(*args, **options | {"variant": plain}))
    chosen = suites.Suites(steps, whole, [suites.MemoryCase(MODEL, 2, 5)], [suites.StepCase(MODEL, 1, 5, options=(("depth", 1),))], [])
    path = tmp_path / "x.jsonl"
    about = record.run_environment(CPU)
    assert run.measure_suites(chosen, run.ORDER, CPU, budget.Budget(1000), about, path) == []
    rows = record.read(path)
    assert {row["kind"] for row in rows} == {"step", "whole", "memory"}
    assert not any("not_timed" in row or "not_measured" in row for row in rows)
    assert all(row["commit"] and row["torch"] and row["device_class"].startswith("cpu-") and row["resolved"] for row in rows)
    sparse = [row for row in rows if row["kind"] == "step" and row["active"] == 5 and row["suite"] == "steps"]
    assert [row["side"] for row in sparse] == ["ours", "eager", "compiled"]
    assert all(row["ms"][0] <= row["ms"][1] <= row["ms"][2] and row["tokens"] == 6 for row in sparse)
    assert sparse[0]["over_eager"][1] > 0
    assert sparse[1]["over_ours"][1] > 0
    made = [row for row in rows if row["kind"] == "whole"]
    assert len(made) == 8
    assert all(row["extrapolated"] and row["images"] == 8 and row["seconds"][0] > 0 for row in made)
    kept = {row["side"]: row["kept_bytes"] for row in rows if row["kind"] == "memory"}
    assert 0 < kept["ours"] < kept["eager"]
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert paper.main(["--device", "x", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "paper.md").read_text()
    assert "18.82 (2.57x)" in text
    assert MISSING in text  # DeiT-Base was not measured
    assert (tmp_path / "speedup.png").read_bytes()[:4] == b"\x89PNG"
    assert "figures are missing" in capsys.readouterr().out


def test_a_side_with_another_loss_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(ours, "make_step", lambda *_, **__: lambda: torch.tensor(123.0))
    rates = ceilings.ceilings_by_dtype(CPU)
    rows = inversions.measure_step(suites.StepCase(MODEL, 2, 5), CPU, 0.1, rates)
    assert [(row["side"], "not_timed" in row) for row in rows] == [("eager", False), ("ours", True)]
    assert "first loss is 123" in rows[1]["not_timed"]


@pytest.mark.parametrize("kind", ["steps", "memory", "whole"])
def test_a_side_that_does_not_fit_ends_alone(small, monkeypatch, capsys, kind):
    """OutOfResources, which is no RuntimeError, in ours: eager is measured, and the suite goes on."""

    class OutOfResources(Exception):
        pass

    def out_of_resources(*_, **__):
        raise OutOfResources("shared memory, Required: 106624, Hardware limit: 101376")

    monkeypatch.setattr(ours, "make_step", out_of_resources)
    monkeypatch.setattr(ours, "invert", out_of_resources)
    cases = {"steps": [suites.StepCase(MODEL, 2, 5)], "memory": [suites.MemoryCase(MODEL, 2, 5)]}
    cases["whole"] = [suites.WholeCase(MODEL, "dense", None, 2, 2, (2, 4), ("ours", "eager"))]
    chosen = suites.Suites(cases["steps"], cases["whole"], cases["memory"], [], [])
    written: list[dict] = []
    monkeypatch.setattr(record, "append", lambda path, rows: written.extend(rows))
    assert run.measure_suites(chosen, [kind], CPU, budget.Budget(1000), record.run_environment(CPU), None) == []
    refused = {row["side"]: row.get("not_timed", row.get("not_measured", "")) for row in written}
    assert set(refused) >= {"eager", "ours"}
    assert not refused["eager"]
    assert "Required: 106624" in refused["ours"]
    assert "Required: 106624" in capsys.readouterr().out
    {"steps": tables.steps, "memory": tables.memory, "whole": tables.whole_runs}[kind](written)
    for side in ("ours", "eager"):
        assert (Results(written).whole(MODEL, cases["whole"][0].title, side) is None) == (kind != "whole" or side == "ours")


def test_a_run_without_time_names_what_it_left_out(small, capsys):
    chosen = suites.Suites([suites.StepCase(MODEL, 2, 5)], [], [], [], [])
    left = run.measure_suites(chosen, ["steps"], CPU, budget.Budget(0), {}, None)
    assert left == ["steps: deit-tiny, batch 2, 5 patches"]


def test_extrapolation_is_the_line_through_two_lengths():
    assert inversions.extrapolate({10: 3.0, 30: 7.0}, 100) == pytest.approx(1 + 0.2 * 100)
    assert inversions.extrapolate({100: 9.0}, 100) == 9.0
    assert budget.rounds_for(60, 1.0) == budget.MOST_ROUNDS
    assert budget.rounds_for(0.1, 1.0) == budget.LEAST_ROUNDS


@pytest.mark.slow
def test_the_peak_of_a_process_is_more_than_what_a_step_keeps():
    found = {side: memory.peak_of(side, MODEL, 4, 46, {"depth": 4}, CPU, 1) for side in ("eager", "ours")}
    model = make.build_model(MODEL, {"depth": 4}, CPU)
    for side, peak in found.items():
        assert peak["idle_bytes"] > 1e8
        assert peak["peak_above_idle_bytes"] > 0.8 * make.make_step(side, model, 4, 46).kept_bytes()
    assert json.dumps(found)
