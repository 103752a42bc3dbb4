"""Verdicts in result files become the table that the package ships."""

import json

from bench.measuring import record
from bench.tables import verified
from bench.tables.rows import read_all
from smi.kernels.verification import VERIFIED


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
