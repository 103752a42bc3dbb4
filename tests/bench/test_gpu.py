"""What of `python -m bench.gpu` can run without a GPU: on small shapes, kernels interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.measuring import record
from bench.measuring.ceilings import Ceilings
from bench.tables import verified
from bench.tables.rows import read_all
from smi.kernels import versions
from smi.kernels.check_process import Checker, self_check
from smi.kernels.verdicts import Key, verdict_of

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_whole_run_on_the_cpu(small_cases, monkeypatch, tmp_path, capsys):
    """All that `python -m bench.gpu` does, on small shapes, the Triton kernels interpreted: verdicts and cases in the file, tables printed."""
    sizes = versions.sizes_of("layer_norm")
    several = sizes.arguments
    monkeypatch.setattr(sizes, "arguments", lambda *about: list(several(*about))[1:])  # few rows
    monkeypatch.setattr(sizes, "SIZES", {"forward": ("d64",), "backward": ("d64",)})
    monkeypatch.setattr(Checker, "check", lambda self, key, device: self_check(key, device))  # not in another process, which would not know these
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu, "cases", lambda batch, only: [case for case in small_cases.values() if case.operation in only])
    about = {"device": "Imaginary 1", "dirty": False, "architecture": "sm_90", "commit": "0"}
    monkeypatch.setattr(record, "cuda_environment", lambda device: dict(about))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "measure_ceilings", lambda device: Ceilings(1e9, 1e9))
    assert gpu.measure_operations(CPU, ["layer_norm"], 100.0, compiled=False) == 0
    rows = [json.loads(line) for line in (tmp_path / "imaginary-1.jsonl").read_text().splitlines()]
    verdicts = [row for row in rows if row["kind"] == "verdict"]
    called = [(f, d) for d in ("bfloat16", "float16", "float32") for f in ("forward", "backward")]
    assert [(v["function"], v["dtype"], v["outcome"]) for v in verdicts] == [(f, d, "correct") for f, d in called]
    timed = [row for row in rows if row["kind"] == "case" and "not_timed" not in row]
    assert [row["side"] for row in timed if row["side"] != "cpu"] == ["stock", "eager"]
    assert all(row["resolved"] in versions.VERSIONS and len(row["warm_us"]) == 3 and row["commit"] == "0" for row in timed)
    assert verified.table(read_all(tmp_path))["architectures"]["sm_90"][0]["operation"] == "layer_norm"
    assert "layer_norm forward (triton, bfloat16, d64)" in capsys.readouterr().out
    assert gpu.measure_operations(CPU, ["layer_norm"], 0.0, compiled=False) == 0
    assert "no time left for layer_norm 2x5 tokens: run again with --only" in capsys.readouterr().out


@pytest.mark.parametrize(("outcome", "code"), [("unsupported", 0), ("incorrect", 1), ("failed", 1), ("crashed", 1)])
def test_what_a_version_does_not_take_is_no_failure(monkeypatch, tmp_path, outcome, code):
    """`make gpu` goes on to the table of verdicts."""
    found = [verdict_of(Key("attention", "forward", "cuda", "float32", "d64 n64"), outcome, "it takes bfloat16 and float16, not float32")]
    monkeypatch.setattr(gpu, "verdicts", lambda *args: found)
    monkeypatch.setattr(gpu, "cases", lambda *args: [])
    monkeypatch.setattr(record, "cuda_environment", lambda device: {"device": "Imaginary 1", "dirty": False, "architecture": "sm_90"})
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "measure_ceilings", lambda device: Ceilings(1e9, 1e9))
    assert gpu.measure_operations(CPU, ["attention"], 100.0, compiled=False) == code


def test_runs_from_the_root_without_installation():
    """Only the checkout on the path, no installed package: smi.kernels is found beside smi."""
    root = Path(__file__).parents[2]
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    code += "import smi.kernels; print(smi.kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.stdout.strip() == str(root / "kernels" / "__init__.py"), done.stderr
