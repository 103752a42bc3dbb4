"""Verdicts in result files become the table that the package ships."""

import json

from bench.measuring import record
from bench.tables import verified
from bench.tables.rows import read_all
from smi.kernels.verdicts import COMPILED_BY, VERIFIED, Verdict


def verdict_row(**changes):
    found = Verdict("layer_norm", "forward", "triton", "bfloat16", "d1024", "correct", 1.5, "")
    made_by = {"triton": "3.6.0", "ptxas": "12.8.93", "source": "0123"}
    return {"kind": "verdict", "dirty": False, "architecture": "sm_90", "device": "X"} | made_by | found._asdict() | changes


def test_verified_takes_the_last_clean_verdict(tmp_path):
    rows = [verdict_row(), verdict_row(speedup=2.0), verdict_row(speedup=9.0, dirty=True), {"kind": "case"}, verdict_row(architecture="sm_80")]
    record.append(tmp_path / "x.jsonl", rows[:2])
    record.append(tmp_path / "x.jsonl", rows[2:])
    made = verified.table(read_all(tmp_path))["architectures"]
    assert list(made) == ["sm_80", "sm_90"]
    assert [v["speedup"] for v in made["sm_90"]] == [2.0]


def test_verified_names_what_was_called_and_what_compiled_it():
    rows = [verdict_row(), verdict_row(function="backward"), verdict_row(ptxas="13.1.80"), verdict_row(size="d256", outcome="unsupported")]
    made = verified.table(rows)["architectures"]["sm_90"]
    assert len(made) == 4
    assert all({*COMPILED_BY, *Verdict._fields} == set(found) for found in made)


def test_a_crash_is_no_verdict():
    made = verified.table([verdict_row(), verdict_row(outcome="crashed", speedup=0.0), verdict_row(size="d256", outcome="crashed")])
    assert [v["outcome"] for v in made["architectures"]["sm_90"]] == ["correct"]


def test_verified_table_is_what_the_result_files_give(capsys):
    assert verified.main(["--check"]) == 0
    assert json.loads(VERIFIED.read_text()) == verified.table(read_all())
