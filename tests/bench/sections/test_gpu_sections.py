"""Every section of a GPU's measurement, rehearsed in small on the CPU: what it does, the rows that it leaves, the line that it gives."""

import time
from pathlib import Path

import pytest
import timm
import torch

from bench.measuring import ceilings, inversions, rows_file
from bench.sections import plans, runner, setting, worker
from bench.sections.progress import FINISHED, Progress
from bench.tables import verified
from bench.tables.rows import measurements
from smi.kernels import versions
from smi.kernels.check_process import Checker
from smi.kernels.verdicts import verdict_of

SECTIONS = {section.name: section for section in (*plans.FIRST, *plans.ALL)}
COLUMNS = {"commit", "dirty", "device", "torch", "run", "section", "kind"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes that a rehearsal changes are put back; what compiles is not compiled."""
    from bench.sides import compiled

    monkeypatch.setenv("SMI_BACKEND", "stock")  # the layers of a GPU, and not those of the CPU's engine
    monkeypatch.setattr(timm, "create_model", timm.create_model)
    monkeypatch.setattr(ceilings, "CPU_SIZES", dict(ceilings.CPU_SIZES))
    monkeypatch.setattr(inversions, "ITERATIONS", inversions.ITERATIONS)
    make = compiled.make_step
    monkeypatch.setattr(compiled, "make_step", lambda *args, **options: make(*args, **options | {"variant": compiled.PLAIN}))


def rehearse(name: str, folder: Path, part: str = runner.WHOLE, **options) -> tuple[worker.Work, list[dict]]:
    """Run a section in this process: what it was given, and its rows."""
    progress = Progress(folder / "progress.jsonl", "code", "call")
    work = worker.Work(name, part, folder, progress, {"device": "cpu", **options}, time.monotonic() + 1000)
    worker.function_of(SECTIONS[name].run)(work)
    states = progress.states()
    assert states, "no case was tried"
    assert set(states.values()) == {FINISHED}, [row for row in progress.rows() if row["state"] != FINISHED]
    (file,) = (path for path in folder.glob("*.jsonl") if path.name != "progress.jsonl")
    return work, rows_file.read(file)


def test_limits_leave_time_to_start_and_end_within_570_seconds():
    from bench import gpu

    for plan, seconds in ((plans.FIRST, gpu.SECONDS[True]), (plans.ALL, gpu.SECONDS[False])):
        assert sum(section.limit for section in plan) <= seconds
        assert len({section.name for section in plan}) == len(plan)
        assert all(worker.function_of(section.run) for section in plan)
    assert gpu.SECONDS[True] <= 560
    names = [section.name for section in plans.FIRST]
    assert names[:4] == ["versions", "checks", "verdicts", "steps"]
    assert names[-1] == "compiled"
    assert set(SECTIONS["checks"].parts) == set(versions.OPERATIONS)


def test_machine_and_ceilings(tmp_path):
    work, rows = rehearse("versions", tmp_path)
    assert [row["kind"] for row in rows] == ["machine", "carried", "ceilings"]
    assert all(row.keys() >= COLUMNS for row in rows)
    assert any("libraries: attention " in text for text in work.found)
    assert setting.ceilings(work, setting.settle(work))["float32"].flops == rows[2]["ceilings"]["float32"][1]  # not measured again


@pytest.mark.parametrize("operation", ["attention", "linear_residual", "image_step"])
def test_calls_of_the_engine_are_checked(operation, tmp_path):
    """All functions of the operation that a step calls, among them those that no public operation reaches."""
    work, rows = rehearse("checks", tmp_path, operation)
    found = {row["function"] for row in rows}
    wanted = {
        "attention": {"forward", "backward"},
        "linear_residual": {"forward", "backward", "backward_gelu"},
        "image_step": {"tv_norms", "forward"},
    }
    taken = [row for row in rows if "unsupported" not in row]
    assert found == wanted[operation]
    assert taken
    assert all(row["correct"] and row["repeats"] and row["errors"] for row in taken)
    assert work.found[0] == f"{operation} {len(taken)} of {len(taken)} right"


def test_a_wrong_function_is_named(tmp_path, monkeypatch):
    kernel = versions.load("layer_norm", "cpu")
    plain = kernel.backward
    monkeypatch.setattr(kernel, "backward", lambda *args: plain(*args) * 1.1)
    work, rows = rehearse("checks", tmp_path, "layer_norm")
    assert {(row["function"], row["version"]) for row in rows if not row.get("correct", True)} == {("backward", "cpu")}
    assert any(name.startswith("cpu layer_norm backward") for name in work.wrong)


def test_what_changes_from_run_to_run_is_not_right(tmp_path, monkeypatch):
    """A race shows as another result at the second run, within any tolerance."""
    kernel = versions.load("layer_norm", "cpu")
    plain, calls = kernel.forward, []

    def forward(*args):
        calls.append(0)
        y, *rest = plain(*args)
        return (y if len(calls) % 2 else torch.nextafter(y, torch.full_like(y, 9.0))), *rest

    monkeypatch.setattr(kernel, "forward", forward)
    _, rows = rehearse("checks", tmp_path, "layer_norm")
    found = [row["repeats"] for row in rows if (row["function"], row["version"]) == ("forward", "cpu") and "repeats" in row]
    assert found
    assert not any(found)


def test_the_engine_as_a_whole(tmp_path):
    work, rows = rehearse("engine", tmp_path)
    assert {row["kind"] for row in rows} == {"gradient", "replays", "events"}
    assert all(row["right"] for row in rows), rows
    assert "least cosine" in work.found[0]


@pytest.mark.parametrize("float16", ["unsupported", "incorrect"])
def test_verdicts_make_the_table(float16, tmp_path, monkeypatch):
    """What a version does not take is no failure; what is not right is named."""
    sizes = versions.sizes_of("layer_norm")
    several = sizes.arguments
    monkeypatch.setattr(sizes, "arguments", lambda *about: list(several(*about))[1:])  # few rows
    monkeypatch.setattr(sizes, "SIZES", {"forward": ("d64",), "backward": ("d64",)})
    answers = {"float16": float16}
    monkeypatch.setattr(Checker, "check", lambda self, key, device: verdict_of(key, answers.get(key.dtype, "correct"), "", 1.5))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    work, rows = rehearse("verdicts", tmp_path)
    assert {(row["operation"], row["function"]) for row in rows} == {("layer_norm", "forward"), ("layer_norm", "backward")}
    assert work.found == ["4 of 6 chosen"]
    assert len(work.wrong) == (2 if float16 == "incorrect" else 0)
    made = verified.table([row | {"dirty": False, "architecture": "sm_90"} for row in rows])
    assert len(made["architectures"]["sm_90"]) == len(rows)


@pytest.mark.parametrize("name", ["steps", "compiled"])
def test_steps(name, tmp_path):
    work, rows = rehearse(name, tmp_path)
    assert len(rows) == 6
    assert len(measurements(rows)) == 3
    assert all("ms" in row for row in rows), rows
    assert any(text.endswith("x eager" if name == "steps" else "x compiled") for text in work.found)


def test_a_whole_run(tmp_path):
    work, rows = rehearse("whole", tmp_path)
    assert [(row["side"], row["extrapolated"]) for row in rows] == [("ours", False)]
    assert work.found[0].startswith("4 images in ")


def test_calls_are_timed_beside_the_plain_gemm(tmp_path):
    _, rows = rehearse("calls", tmp_path)
    gemms = [row for row in rows if row["operation"].startswith("linear_")]
    assert gemms
    assert all(row["us"]["cublas"][1] > 0 and row["us"]["stock"][1] > 0 for row in gemms)
    assert {row["function"] for row in gemms} == {"forward", "backward", "backward_gelu"}


def test_attention_lengths(tmp_path, monkeypatch):
    from bench.sections import timed

    assert len(timed.LENGTHS) == 6
    monkeypatch.setattr(timed, "LENGTHS", (29,))
    monkeypatch.setattr(timed, "SAMPLES", 1)
    _, rows = rehearse("attention", tmp_path)
    assert {row["case"] for row in rows} == {"2x29 tokens"}
    assert {"stock", "eager", "sdpa flash"} <= {row["side"] for row in rows}


def test_profiles(tmp_path):
    work, rows = rehearse("profiles", tmp_path)
    assert [row["trace"] for row in rows] == ["trace-all.json.gz", "trace-5.json.gz"]
    assert all((tmp_path / row["trace"]).exists() and row["kernels"][0]["us"] > 0 for row in rows)


def test_without_the_sanitizer_it_says_so(tmp_path, monkeypatch):
    from bench.sections import machine

    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    work, rows = rehearse("sanitizer", tmp_path)
    assert [row["tool"] for row in rows] == ["memcheck", "racecheck"]
    assert work.found == ["memcheck: compute-sanitizer is not there", "racecheck: compute-sanitizer is not there"]
