"""The demo: every method, what the images are worth, the table, the report; what it leaves out, and how it stops."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from smi.cli.demo import print_demo
from smi.demo import METHODS, demo, downstream
from smi.errors import InputError, RunError
from smi.images.sparse_images import SparseImages

SMALL = {"iterations": 8, "num_images": 8, "progress": False}
INVERTED = ["dense", "SMI", "PRI v=2", "PRI v=4", "PRI v=4, random", "PRI v=7"]
METHOD_FOLDERS = ["dense", "smi", "pri2", "pri4", "pri4-random", "pri7"]


@pytest.mark.slow
def test_methods_are_made_used_and_reported(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("torchao")
    monkeypatch.setattr("smi.demo.run.METHODS", (METHODS[0], METHODS[1], METHODS[3]))
    result = demo(tmp_path, transfer_steps=2, **SMALL)
    assert [row["method"] for row in result["table"]] == ["dense", "SMI", "PRI v=4", "Gaussian noise", "real images"]
    assert {row["images"] for row in result["table"]} == {8}
    assert all(0 <= row[name] <= 1 for row in result["table"] for name in ("agreement", "w8a8", "w4a8", "transfer"))
    assert all(row["w8a8"] > 0.9 for row in result["table"][:3]), "eight bits cost the digits next to nothing"
    assert result["full"] > 0.97
    assert result["table"][-1]["agreement"] > 0.9
    assert all(row["flops_speedup"] > 2 and row["speedup"] > 0 for row in result["table"][1:3])
    assert not result["notes"]
    assert json.loads((tmp_path / "demo.json").read_text())["table"] == result["table"]
    page = Path(result["report"]).read_text()
    assert all(f"<h2>{row['method']}</h2>" in page for row in result["table"])
    assert "Published figures beside ours" in page
    print_demo(result)
    shown = capsys.readouterr().out
    assert f"report: {tmp_path / 'report.html'}" in shown
    assert "W8/A8" in shown


@pytest.mark.parametrize("width", [80, 130])
def test_the_table_fits_a_narrow_terminal(width, monkeypatch, capsys):
    from rich.console import Console

    for module in ("smi.console", "smi.cli.demo"):
        monkeypatch.setattr(f"{module}.make_console", lambda: Console(width=width))
    timed = {"seconds": 123.4, "images_per_second": 12.3, "speedup": 12.34, "flops_speedup": 12.67}
    shares = {"agreement": 1.0, "w8a8": 0.996, "w4a8": 0.996, "transfer": 0.584}
    table = [
        {"method": "PRI v=4, random", "sparsity": 0.75, "images": 84, **timed, **shares},
        {"method": "real images", "sparsity": 0.0, "images": 84},
    ]
    settings = {"iterations": 200, "batch_size": 12, "tv_weight": 0.005, "device": "cpu"}
    print_demo({"table": table, "settings": settings, "notes": ["A note."], "picture": "demo.png", "report": "report.html"})
    shown = capsys.readouterr().out
    assert "…" not in shown
    for figure in ("PRI v=4, random", "123.4", "12.34x", "100.0%", "58.4%", "A note.", "report: report.html"):
        assert figure in shown


@pytest.fixture
def without_real_digits(monkeypatch):
    def missing(*_):
        raise InputError("digits needs scikit-learn: pip install it")

    monkeypatch.setattr("smi.demo.run.load", missing)


def test_without_scikit_learn_the_rest_is_made(tmp_path, capsys, without_real_digits):
    result = demo(tmp_path, transfer_steps=0, **SMALL)
    print_demo(result)
    assert "left out: digits needs scikit-learn" in capsys.readouterr().out
    assert [row["method"] for row in result["table"]] == INVERTED
    assert sorted(path.parent.name for path in tmp_path.glob("*/images.json")) == sorted(METHOD_FOLDERS)
    assert [len(SparseImages.load(tmp_path / folder)) for folder in METHOD_FOLDERS] == [8] * len(METHODS)
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    (note,) = result["notes"]
    assert "left out: digits needs scikit-learn" in note
    assert note in (tmp_path / "report.html").read_text()


def test_without_torchao_only_its_columns_are_missing(monkeypatch):
    def missing(*_, **__):
        raise InputError("quantisation needs torchao: pip install torchao")

    monkeypatch.setattr(downstream, "quantize", missing)
    teacher = downstream.digits()
    images = SparseImages(
        torch.randn(4, 64, 1, 4, 4), torch.arange(64).expand(4, -1), torch.arange(4), torch.arange(4), torch.zeros(4, dtype=torch.int64),
        (8, 8), (0.3,), (0.3,),
    )  # fmt: skip
    found = downstream.worth(teacher, images, (torch.randn(5, 1, 32, 32), torch.arange(5)), transfer_steps=1, seed=0)
    assert found["notes"] == ["The quantised accuracy is left out: quantisation needs torchao: pip install torchao."]
    assert "w8a8" not in found
    assert 0 <= found["transfer"] <= 1
    assert "transfer" not in downstream.worth(teacher, images, (torch.randn(5, 1, 32, 32), torch.arange(5)), transfer_steps=0, seed=0)


def test_the_work_is_shared_fairly(monkeypatch, tmp_path):
    costs = {tmp_path / name: cost for name, cost in (("a", 60), ("b", 50), ("c", 30), ("d", 30), ("e", 10))}
    monkeypatch.setattr(downstream.SparseImages, "load", staticmethod(lambda folder: folder))
    monkeypatch.setattr(downstream, "_cost", costs.__getitem__)
    shares = downstream._shares(list(costs), 2)
    assert sorted(map(str, shares[0] + shares[1])) == sorted(map(str, costs))
    assert sorted(sum(costs[folder] for folder in share) for share in shares) == [90, 90]


def test_a_process_that_fails_says_why(tmp_path):
    images = SparseImages(
        torch.randn(2, 4, 1, 3, 3), torch.arange(4).expand(2, -1), torch.arange(2), torch.arange(2), torch.zeros(2, dtype=torch.int64),
        (2, 2), (0.3,), (0.3,),
    )  # fmt: skip
    images.save(tmp_path / "odd")
    with pytest.raises(RunError, match="judging the images failed .*the teacher cannot take images of 1x6x6"):
        downstream.judge_all([tmp_path / "odd"], transfer_steps=1, seed=0, progress=False)


@pytest.mark.parametrize("steps", [-1, 1.5])
def test_steps_that_make_no_sense(tmp_path, steps):
    with pytest.raises(InputError, match="transfer_steps must be"):
        demo(tmp_path / "out", transfer_steps=steps, **SMALL)
    assert not (tmp_path / "out").exists()


SCRIPT = """
import sys
from smi.demo import downstream
from pathlib import Path
downstream.judge_all([Path(sys.argv[1])], transfer_steps=100000, seed=0, progress=True)
"""


@pytest.mark.skipif(not hasattr(os, "getpgid"), reason="needs processes of POSIX")
def test_ctrl_c_leaves_no_process_behind(tmp_path):
    pytest.importorskip("sklearn")
    images = SparseImages(
        torch.randn(4, 64, 1, 4, 4), torch.arange(64).expand(4, -1), torch.arange(4), torch.arange(4), torch.zeros(4, dtype=torch.int64),
        (8, 8), (0.3,), (0.3,),
    )  # fmt: skip
    images.save(tmp_path / "dense")
    restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # where the caller ignores it
    command = [sys.executable, "-c", f"{restore}\n{SCRIPT}", str(tmp_path / "dense")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True)
    assert "0 of 1 methods" in process.stderr.readline()
    os.kill(process.pid, signal.SIGINT)  # to the parent alone: the others end because it sees to it
    assert process.wait(60) != 0
    for _ in range(100):
        if not _alive(process.pid):
            break
        time.sleep(0.1)
    assert not _alive(process.pid), "the processes of the group have ended"
    assert not (tmp_path / "dense" / downstream.WORTH).exists()


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
