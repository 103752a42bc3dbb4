"""The evidence runner: its floors, its table, what it refuses, and that nothing which is finished is made again."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch

from bench.evidence import images, run
from bench.evidence.columns import QUANTISED, ROWS, STUDENTS
from bench.evidence.config import COUNTS
from bench.evidence.floors import FLOPS, SPEEDUPS, failures
from bench.evidence.one_method_and_seed import read_columns, write_columns
from bench.measuring import record
from smi.images.sparse_images import SparseImages
from tests.bench.evidence.killer import read

ROOT = Path(__file__).parents[3]
OPTIMISED = ("dense", "psaq", "smi", "pri2", "pri4", "pri7")  # rows whose images cost iterations
COLUMNS = ("agreement", "full", "w8a8", "copy", "small", "trunk")  # one width: every further one exports the teacher again
STEPS = [f"--{name}-steps=5" for name in ("copy", "small", "trunk")]
SMALL = ["--images=42", "--batch-size=6", "--iterations=7", *STEPS, "--trunk-learning=2", "--student-batch=4", "--test-images=20"]
TINY = ["--rows", "gaussian", "pri7", "--columns", *COLUMNS, *SMALL, "--seeds=1", "--jobs=1"]


@pytest.fixture(scope="module", autouse=True)
def _threads():
    """The command sets them for its process, which here is that of all tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# floors


def good_rows():
    """A table in which everything lies above its floor."""
    made = {name: {"full": 0.98, "w8a8": 0.978, "w4a8": 0.97, "copy": 0.95, "small": 0.85} for name in ROWS}
    made["gaussian"] |= {"w8a8": 0.5, "w4a8": 0.4, "copy": 0.4, "small": 0.2}
    for name in OPTIMISED:
        made[name] |= {"flops_ratio": 1.004, "speedup": 12.0}
    return made


def as_rows(columns):
    return [{"method": method, **{name: [value, value] for name, value in found.items()}} for method, found in columns.items()]


def test_nothing_is_said_of_a_table_above_its_floors():
    assert failures(as_rows(good_rows())) == []


LOW = [("copy", method, 0.85) for method in ("smi", "pri2", "pri4", "pri7", "dense")]
LOW += [("small", method, 0.5) for method in ("smi", "pri2", "pri4", "pri7", "dense")]
LOW += [("speedup", method, floor - 0.1) for method, floor in SPEEDUPS.items()]
LOW += [(column, method, 0.95) for column in ("w8a8", "w4a8") for method in (*OPTIMISED, "real")]
LOW += [("flops_ratio", method, ratio) for method, ratio in zip(OPTIMISED, (0.97, 1.03) * 3, strict=True)]
HIGH = [("copy", "gaussian", 0.85), ("small", "gaussian", 0.5)]


@pytest.mark.parametrize(("column", "method", "value"), LOW + HIGH)
def test_each_value_beyond_its_floor_is_named(column, method, value):
    planted = good_rows()
    planted[method][column] = value
    wrong = failures(as_rows(planted))
    named = {"flops_ratio": "FLOPs"}.get(column, column)
    assert any(f"{named} of {method} " in line or f"{named} of {method} are" in line for line in wrong)
    assert all(f"{value:.3f}" in line for line in wrong)


def test_pri_may_not_fall_far_behind_smi():
    planted = good_rows()
    planted["pri4"]["copy"], planted["smi"]["copy"] = 0.91, 0.96
    (line,) = failures(as_rows(planted))
    assert "copy of pri4 is 0.910" in line
    assert "0.960" in line


def test_the_mean_over_seeds_is_judged():
    rows = as_rows(good_rows())
    row = next(row for row in rows if row["method"] == "pri7")
    row["small"] = [0.6, 0.8]
    assert failures(rows) == []
    row["small"] = [0.5, 0.7]
    assert len(failures(rows)) == 1


def test_what_is_missing_is_named():
    planted = good_rows()
    del planted["pri7"]
    del planted["gaussian"]["small"], planted["dense"]["w4a8"], planted["psaq"]["flops_ratio"]
    wrong = failures(as_rows(planted))
    missing = [("copy", "pri7"), ("small", "pri7"), ("speedup", "pri7"), ("small", "gaussian"), ("w4a8", "dense"), ("flops_ratio", "psaq")]
    assert set(wrong) == {f"{column} of {method} was not measured" for column, method in missing}
    assert failures([])  # a run of nothing passes no check
    assert len(failures([{"method": "smi", "copy": [0.95], "small": [0.85], "speedup": [12.0]}], "cifar10")) == 4


@pytest.mark.parametrize("column", ["copy", "speedup", "flops_ratio", "w8a8"])
def test_what_is_no_number_reaches_no_floor(column):
    planted = good_rows()
    planted["smi"][column] = float("nan")
    (line,) = failures(as_rows(planted))
    assert "nan" in line


def test_other_data_has_only_the_common_floors():
    planted = good_rows()
    planted["smi"]["copy"] = 0.2
    assert failures(as_rows(planted), "cifar10") == []
    planted["smi"]["w8a8"] = planted["pri2"]["flops_ratio"] = 0.5
    assert len(failures(as_rows(planted), "cifar10")) == 2


# the columns of the methods


def settings(*arguments):
    """The settings of a command line."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "open_folder", lambda folder, config, force: made.append(config))
        patch.setattr(run, "run", lambda *given: None)
        patch.setattr(run, "collect", lambda *given: [])
        assert run.main([*arguments, "--no-append"]) == 0
    return made[0]


@pytest.mark.parametrize("row", OPTIMISED)
def test_counted_flops_are_those_of_the_cost_model(row):
    count, ratio = images.count_flops(settings(), row)
    assert abs(ratio - 1) < FLOPS
    dense, _ = images.count_flops(settings(), "dense")
    assert count == dense if row in ("dense", "psaq") else count < 0.7 * dense


def test_every_row_asks_for_the_same_images_and_weight_of_the_total_variation():
    config = settings()
    for row in OPTIMISED:
        asked = images.inversion_settings(config, row)
        assert (asked["num_images"], asked["iterations"], asked["batch_size"]) == (config.images, config.iterations, config.batch_size)
        assert asked.get("tv_weight", config.tv_weight) == config.tv_weight
    assert [images.inversion_settings(config, row)["division"] for row in ("pri2", "pri4", "pri7")] == [2, 4, 7]


# the table


def test_columns_by_seed_and_their_mean_and_deviation(tmp_path, capsys):
    for seed, (dense, pri) in enumerate([(60.0, 6.0), (64.0, 8.0)]):
        write_columns(tmp_path, "dense", seed, seconds=dense, agreement=1.0, full=0.98, copy_curve=[{"step": 1}])
        write_columns(tmp_path, "pri4", seed, seconds=pri, agreement=0.9 + 0.02 * seed, full=0.98)
        write_columns(tmp_path, "gaussian", seed, seconds=0.1, full=0.98)
    write_columns(tmp_path, "dense", 1, copy=0.5)  # known for one seed of two
    rows = ["gaussian", "dense", "pri4"]
    noise, dense, pri = found = run.collect(tmp_path, 2, rows)
    assert [row["method"] for row in found] == rows
    assert dense["seconds"] == [60.0, 64.0]
    assert dense["speedup"] == [1.0, 1.0]
    assert pri["speedup"] == [10.0, 8.0]  # of the same seed
    write_columns(tmp_path, "real", 0, seconds=0.1)
    write_columns(tmp_path, "real", 1, seconds=0.1)
    assert all("speedup" not in row for row in (noise, run.collect(tmp_path, 2, [*rows, "real"])[-1]))
    assert "copy" not in dense
    assert "copy_curve" not in dense
    run.show(settings(), found, 2)
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if "PRI v=4" in line)
    assert "7.0 ± 1.4" in line
    assert "9.00 ± 1.41" in line
    assert "91.0 ± 1.4" in line
    assert "copy" not in shown


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar10"], "cifar10 needs a teacher"),
        *(([f"--{name}", "0"], f"{name} must be at least 1, got 0") for name in (count.replace("_", "-") for count in COUNTS)),
        (["--tv-weight", "nan"], "tv_weight must be"),
        (["--teacher", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, message, tmp_path, capsys):
    assert run.main([*TINY, "--rows", "pri7", "--folder", str(tmp_path / "out"), "--no-append", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("evidence: ")
    assert err.count("\n") == 1, f"one sentence expected, got: {err}"
    assert message in err
    assert not list(tmp_path.rglob("cell.json"))


def test_a_refused_command_does_not_stand_in_the_way_of_the_right_one(tmp_path, capsys):
    command = [*TINY, "--rows", "gaussian", "--columns", "full", "--folder", str(tmp_path), "--no-append"]
    assert run.main([*command, "--rows", "pri7", "--tv-weight", "nan"]) == 2
    assert run.main(command) == 0


def test_too_few_images_for_the_trunk(tmp_path, capsys):
    few = ["--images=7", "--batch-size=1", "--rows", "pri7", "--columns", "trunk"]
    assert run.main([*TINY, *few, "--folder", str(tmp_path), "--no-append"]) == 2
    assert "no image shows one of the classes 5 to 9" in capsys.readouterr().err


def test_imagenet_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SMI_IMAGENET", raising=False)
    arguments = ["--data", "imagenet", "--rows", "real", "--folder", str(tmp_path), "--no-append"]
    assert run.main(arguments) == 2
    assert "pass its folder as --path, or set SMI_IMAGENET" in capsys.readouterr().err
    monkeypatch.setenv("SMI_IMAGENET", "")  # set by --path, and put back when the test ends
    assert run.main([*arguments, "--path", str(tmp_path / "no")]) == 2
    assert "no/deit_tiny_patch16_224.safetensors" in capsys.readouterr().err


def test_differences_to_real_images_are_of_pairs(tmp_path):
    """On four test images and two seeds, or as many as are known."""
    for seed, bits in enumerate("73"):
        write_columns(tmp_path, "pri4", seed, full=0.75, full_right="f", published_w8a8=0.75, published_w8a8_right=bits, test_images=4)
        write_columns(tmp_path, "real", seed, full=0.75, full_right="f", published_w8a8=1.0, published_w8a8_right="f", test_images=4)
    write_columns(tmp_path, "smi", 0, published_w8a8=0.75, published_w8a8_right="7", test_images=4)  # one seed of two
    write_columns(tmp_path, "dense", 1, published_w8a8=1.0, published_w8a8_right="f", test_images=4)  # not the first
    pri, real, smi_row, dense = run.collect(tmp_path, 2, ["pri4", "real", "smi", "dense"])
    assert pri["paired"]["published_w8a8"][0] == pytest.approx(-3 / 8)  # of 1, 1, 1/2, 0 to 1, 1, 1, 1
    assert pri["paired"]["full"] == (0.0, 0.0, 1.0)
    assert "paired" not in real
    assert (smi_row["published_w8a8"], smi_row["paired"]["published_w8a8"][0]) == ([0.75], -0.25)
    assert "published_w8a8" not in dense
    assert "interval" not in dense


def test_data_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SMI_CIFAR10", raising=False)
    arguments = ["--data", "cifar10", "--teacher", "digits", "--rows", "real"]
    assert run.main([*TINY, *arguments, "--folder", str(tmp_path), "--no-append"]) == 2
    assert "set SMI_CIFAR10" in capsys.readouterr().err


# a run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which the command came to its end."""
    pytest.importorskip("sklearn")
    pytest.importorskip("torchao")
    folder = tmp_path_factory.mktemp("evidence") / "out"
    assert run.main([*TINY, "--folder", str(folder), "--no-append"]) == 0
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Where rows are appended instead of bench/results."""
    path = tmp_path / "results" / "here.jsonl"
    monkeypatch.setattr(run, "results_file", lambda device: path)
    return path


def test_a_run_fills_every_cell(made):
    config = json.loads((made / "config.json").read_text())
    assert config == asdict(settings(*TINY))
    for row in ("gaussian", "pri7"):
        cell = read_columns(made, row, 0)
        assert set(COLUMNS) | {"seconds", "confidence"} <= set(cell)
        assert all(0 <= cell[name] <= 1 for name in COLUMNS)
        assert cell["full"] > 0.9  # the teacher on real digits
        for name in STUDENTS:
            assert [point["step"] for point in cell[f"{name}_curve"]] == [1, 2, 3, 4, 5]
            assert cell[f"{name}_curve"][-1]["seconds"] > 0
        assert len(SparseImages.load(made / "seed0" / row / "images")) == 42
    assert abs(read_columns(made, "pri7", 0)["flops_ratio"] - 1) < FLOPS
    assert "gflops" not in read_columns(made, "gaussian", 0)


def state(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "config.json"}


def test_what_is_finished_is_not_made_again(folder, capsys):
    write_columns(folder, "pri7", 0, copy=0.123)
    before = state(folder)
    assert run.main([*TINY, "--folder", str(folder), "--no-append"]) == 0
    assert state(folder) == before
    shown = capsys.readouterr().out
    assert "seed 0" not in shown
    assert "12.3" in next(line for line in shown.splitlines() if "PRI v=7" in line)


def test_a_column_that_is_missing_is_made_and_no_other(folder, capsys):
    cell = read_columns(folder, "pri7", 0)
    kept = {name: value for name, value in cell.items() if name != "agreement"}
    (folder / "seed0" / "pri7" / "cell.json").write_text(json.dumps({**kept, "full": 0.5}))
    assert run.main([*TINY, "--folder", str(folder), "--no-append"]) == 0
    assert read_columns(folder, "pri7", 0) == {**cell, "full": 0.5}
    assert [line.split(":")[1].split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("seed")] == ["agreement"]


def test_a_folder_of_other_settings_is_refused_unless_forced(folder, capsys):
    other = [*TINY, "--tv-weight", "1e-3", "--folder", str(folder), "--no-append"]
    before, config = state(folder), (folder / "config.json").read_text()
    assert run.main(other) == 2
    err = capsys.readouterr().err
    assert err == f"evidence: {folder} holds evidence of other settings: choose another --folder, or pass --force to go on in it\n"
    assert (folder / "config.json").read_text() == config
    assert run.main([*other, "--force"]) == 0
    assert state(folder) == before
    assert json.loads((folder / "config.json").read_text())["tv_weight"] == 1e-3


def test_tables_of_mixed_settings_are_never_appended(folder, results):
    results.parent.mkdir()
    results.write_text('{"earlier": 1}\n')
    other = [*TINY, "--tv-weight", "1e-3", "--folder", str(folder)]
    assert run.main([*other, "--force"]) == 0
    assert run.main(other) == 2  # of these settings now, but not all its cells
    assert run.main([*other, "--force"]) == 0
    assert record.read(results) == [{"earlier": 1}]


def test_a_student_half_way_with_other_settings_begins_anew_when_forced(folder, monkeypatch):
    command = [*TINY, "--folder", str(folder), "--no-append"]
    cell = {name: value for name, value in read_columns(folder, "pri7", 0).items() if not name.startswith("copy")}
    (folder / "seed0" / "pri7" / "cell.json").write_text(json.dumps(cell))  # as killed between the student and its cell
    assert run.main([*command, "--copy-steps", "3", "--force"]) == 0
    assert [point["step"] for point in read_columns(folder, "pri7", 0)["copy_curve"]] == [1, 2, 3]


def test_rows_are_appended_once(folder, results, capsys):
    results.parent.mkdir()
    results.write_text('{"earlier": 1}\n')
    command = [*TINY, "--folder", str(folder)]
    assert run.main(command) == 0
    rows = record.read(results)
    assert rows[0] == {"earlier": 1}
    assert [(row["kind"], row["method"]) for row in rows[1:]] == [("evidence", "gaussian"), ("evidence", "pri7")]
    for row in rows[1:]:
        assert row["config"] == json.loads((folder / "config.json").read_text())
        assert {"commit", "dirty", "device", "torch", "time"} <= set(row)
        assert "run" not in row  # the newest run of the suites stays the newest
        assert all(row[name] == [read_columns(folder, row["method"], 0)[name]] for name in ("seconds", *COLUMNS))
    assert run.main(command) == 0
    assert run.main([*command, "--rows", "pri7"]) == 0  # a part of what is there
    assert record.read(results) == rows
    write_columns(folder, "gaussian", 0, copy=0.0)
    assert run.main(command) == 0
    assert record.read(results)[:3] == rows
    assert [row["method"] for row in record.read(results)[3:]] == ["gaussian"]


def test_the_check_fails_with_what_lies_below(folder, results, capsys):
    assert run.main([*TINY, "--folder", str(folder), "--check", "--no-append"]) == 1
    below = [line for line in capsys.readouterr().out.splitlines() if line.startswith("below its floor: ")]
    assert "below its floor: speedup of smi was not measured" in below
    assert any("small of pri7 is " in line for line in below)
    assert not results.exists()


# kills


def values(cell):
    """What a cell says, without the seconds, which are another's every time."""
    curves = {name: [{**point, "seconds": None} for point in points] for name, points in cell.items() if name.endswith("_curve")}
    return {name: value for name, value in {**cell, **curves}.items() if name != "seconds"}


@pytest.mark.slow
def test_killed_ten_times_at_random_moments(made, tmp_path):
    folder, log, columns = tmp_path / "out", tmp_path / "log", [name for name in COLUMNS if name not in QUANTISED]
    command = [*TINY, "--columns", *columns, "--folder", str(folder), "--no-append"]
    subprocess.run([sys.executable, "-m", "tests.bench.evidence.killer", "10", *map(str, (folder, made, log)), *command], check=True, cwd=ROOT)
    ended, states = read(folder), json.loads(log.with_suffix(".states").read_text())
    assert len(states) == 10
    assert len({json.dumps(state) for state in states}) > 4  # spread over the work
    for known in states:
        for name, text in known.items():
            if name.endswith("curve.jsonl"):
                assert ended[name].startswith(text)
            else:  # the seconds, too: nothing was made again
                cell = json.loads(text)
                assert {column: json.loads(ended[name])[column] for column in cell} == cell
    whole = read(made)
    assert set(ended) == set(whole)
    for name in (name for name in whole if name.endswith("cell.json")):
        same = {column: value for column, value in values(json.loads(whole[name])).items() if column.removesuffix("_right") not in QUANTISED}
        assert values(json.loads(ended[name])) == same
    told = re.findall(r"^(seed 0  .+: \w+) [\d.]+$", log.read_text(), re.MULTILINE)
    assert len(told) == len(set(told)) >= len(columns)  # a line is lost where a kill falls between a column and its line


@pytest.mark.slow
def test_workers_end_with_the_command_that_is_killed(made, tmp_path):
    """Else they would write into the cells of the next start."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "bench.evidence", *TINY, "--columns", "agreement", "copy", "--jobs", "2", "--folder", str(folder), "--no-append"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(folder.rglob("cell.json")):
        assert process.poll() is None
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    for row in ("gaussian", "pri7"):
        whole, cell = values(read_columns(made, row, 0)), values(read_columns(folder, row, 0))
        assert cell == {column: value for column, value in whole.items() if column in cell}
        assert {"agreement", "copy"} <= set(cell)
