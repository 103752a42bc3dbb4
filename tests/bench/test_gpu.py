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

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_whole_run_on_the_cpu(small_cases, monkeypatch, tmp_path, capsys):
    """All that `python -m bench.gpu` does, on small shapes, the Triton kernels interpreted: verdicts and cases in the file, tables printed."""
    from smi.kernels.layer_norm import op

    monkeypatch.setattr(op, "example", lambda device, dtype, size: small_cases["layer_norm 2x5 tokens"].build(device, dtype))
    monkeypatch.setattr(gpu, "cases", lambda batch, only: [case for case in small_cases.values() if case.operation in only])
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


def test_runs_from_the_root_without_installation():
    """Only the checkout on the path, no installed package: smi.kernels is found beside smi."""
    root = Path(__file__).parents[2]
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    code += "import smi.kernels; print(smi.kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.stdout.strip() == str(root / "kernels" / "__init__.py"), done.stderr
