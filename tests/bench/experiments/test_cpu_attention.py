"""The benchmark of attention on the CPU: a row for every side, appended where that is asked for."""

import json

import pytest

from bench.experiments import cpu_attention, result_rows
from smi.csrc import host

QUICK = ["--tokens=5", "--batch=1", "--heads=2", "--width=16", "--threads=1", "--rounds=2", "--calls=1"]


def test_a_row_of_every_side(tmp_path, monkeypatch, capsys):
    if reason := host.CPU.why_not():
        pytest.skip(reason)
    results = tmp_path / "results.jsonl"
    monkeypatch.setattr(result_rows, "results_file", lambda device: results)
    cpu_attention.main([*QUICK, "--no-append"])
    assert not results.exists()
    assert "5 tokens, batch 1, 2 heads of 16" in capsys.readouterr().out
    cpu_attention.main(QUICK)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    sides = ["sdpa", "sdpa in float32", "ours", "kernels", "engine"]
    assert [(row["dtype"], row["side"]) for row in rows] == [(dtype, side) for dtype in ("bfloat16", "float32") for side in sides]
    assert all(row["kind"] == "cpu_attention" and row["commit"] and row["threads"] == 1 and "run" not in row for row in rows)
    assert all(row["least_ms"] <= row["ms"][0] <= row["ms"][2] and row["over_sdpa"] > 0 for row in rows)
    assert rows[0]["over_sdpa"] == 1.0
