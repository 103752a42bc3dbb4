"""The published tables: from the rows of the suites, and as a file that names the command it is made by."""

import pytest

from bench import paper
from bench.cases import suites
from bench.measuring import record
from bench.tables.paper import GOALS, as_markdown, made_again, suite_rows
from bench.tables.results import Results
from smi.errors import InputError
from smi.inversion.methods import PRI7, SMI
from smi.inversion.schedules import make_schedule

MODEL = suites.TINY


def test_the_goals_are_about_cases_that_are_measured():
    for chosen, goals in ((suites.on_cpu(), GOALS["cpu"]), (suites.on_gpu(), GOALS["cuda"])):
        assert {goal.case for goal in goals} <= {case.name for case in chosen.steps}


def test_paper_without_rows_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert paper.main(["--device", "nothing"]) == 1
    assert "python -m bench.run" in capsys.readouterr().err


def test_throughput_from_the_steps_of_all_stages():
    """Without whole runs: iterations per second of SMI by the steps of its five stages."""
    base = {"kind": "step", "suite": "steps", "model": MODEL, "side": "ours", "options": {}, "batch": 8, "run": "1"}
    rows = [base | {"case": str(n), "active": n, "ms": [n, n, n]} for n in suites.stage_counts()["SMI"]]
    results = Results(rows)
    its, images, batch, how, read = results.rate(MODEL, SMI, "ours")
    schedule = make_schedule("smi", suites.PATCHES, suites.ITERATIONS)
    mean = sum((s.stop - s.start) * s.active for s in schedule.stages()) / suites.ITERATIONS
    assert its == pytest.approx(1000 / mean)
    assert (batch, how) == (8, "steps")
    assert images == results.images_per_second(MODEL, SMI, "ours") == pytest.approx(its / 4000 * 8)
    assert read == rows
    assert results.rate(MODEL, PRI7, "ours") is None


def suite_row(run: str, threads: int, ms: float, **changes) -> dict:
    about = {"kind": "step", "suite": "steps", "model": MODEL, "options": {}, "batch": 8, "active": 46, "side": "ours", "ms": [ms] * 3}
    about |= {"case": suites.StepCase(MODEL, 8, 46).name, "device": "X", "device_class": f"cpu-avx2-{threads}threads", "threads": threads}
    return about | {"run": run, "time": run, "torch": "2", "commit": "0", "dirty": False} | changes


def test_rows_of_one_processor(tmp_path, monkeypatch):
    """The last one that the suites ran on; of every case the last run that has it, or the last run alone."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    rows = [suite_row("1", 2, 1.0), suite_row("1", 2, 2.0, case="b"), suite_row("2", 1, 3.0), suite_row("3", 2, 4.0), {"kind": "int8", "run": "4"}]
    record.append(tmp_path / "x.jsonl", rows)
    assert [row["ms"][1] for row in suite_rows("x", all_runs=False)] == [4.0]
    assert [row["ms"][1] for row in suite_rows("x", all_runs=True)] == [2.0, 4.0]


def test_the_file_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.append(tmp_path / "x.jsonl", [suite_row("1", 2, 1.0)])
    path = tmp_path / "paper.md"
    path.write_text(as_markdown(Results(suite_rows("x", True)), "x", True, ()))
    assert "`python -m bench.paper --device x --all-runs`" in path.read_text()
    assert made_again(path) == path.read_text()
    record.append(tmp_path / "x.jsonl", [suite_row("2", 2, 2.0)])
    assert made_again(path) != path.read_text()
    path.write_text("tables")
    with pytest.raises(InputError, match="does not name the command"):
        made_again(path)
    path.write_text("`python -m bench.paper --device y`")
    with pytest.raises(InputError, match="there are no rows"):
        made_again(path)
