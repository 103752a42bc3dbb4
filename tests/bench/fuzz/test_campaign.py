"""The fuzzer finds faults that were planted, names their cases, and shrinks them."""

import json
import os
import pickle
import time
from functools import partial

import pytest
import torch

from bench.fuzz import __main__ as command
from bench.fuzz import campaign, damage, draw, edits, files, forks, kinds, payloads
from bench.fuzz.draw import Given, Seeded
from bench.fuzz.models import compare
from bench.fuzz.shrink import shrink
from bench.fuzz.target import Target, Wrong, refused, sentence_or
from smi.errors import InputError

pytestmark = pytest.mark.fast


def numbers(draws):
    """Up to eight numbers: a fault that one of them makes shrinks to that one."""
    return {"numbers": [draws.below(100) for _ in range(draws.integer(0, 8))]}


def planted(fault, seconds=20.0):
    """A target whose cases with a number above 60 meet a fault."""

    def check(case, folder):
        if max(case["numbers"], default=0) > 60:
            fault()
        return "read"

    return Target("files", "planted", "bits", numbers, check, seconds=seconds)


def key_error():
    raise KeyError("grid")


def wrong_gradient():
    truth = torch.ones(4, dtype=torch.float64)
    compare("pixel gradient", -truth.float(), truth, truth.float(), 1e-4)


def two_lines():
    try:
        raise InputError("the folder is damaged:\nTraceback")
    except InputError as error:
        refused(error)


def abort():
    os.abort()


def hang():
    time.sleep(30)


def spin():
    while True:
        pass


def overflow():
    bytes(range(256)) * 2**40


def blow_up():
    assert len(bytearray(600 * 2**20)) > 0


FAULTS = {
    "KeyError": (key_error, "KeyError"),
    "wrong gradient": (wrong_gradient, "pixel gradient is wrong"),
    "two lines": (two_lines, "InputError"),
    "abort": (abort, "SIGABRT"),
    "hang": (hang, "hang"),
    "spin": (spin, "hang"),
    "memory": (overflow, "MemoryError"),
    "blow-up": (blow_up, "memory planted"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_with_its_case_and_shrunk(name, tmp_path):
    fault, key = FAULTS[name]
    target = planted(fault, seconds=0.3 if key == "hang" else 20)
    child = forks.start(target, [partial(Seeded, 1, index) for index in range(50)], tmp_path / "fork")
    ran = forks.result(target, tmp_path / "fork", os.waitpid(child, 0)[1])
    finding = ran.findings[0]
    assert key in finding["key"]
    assert max(finding["case"]["numbers"]) > 60
    if name not in ("hang", "spin", "blow-up"):  # a second each
        assert shrink(target, finding, tmp_path / "shrink", seconds=30)["case"] == {"numbers": [61]}


def test_a_fork_goes_on_after_what_it_can_survive(tmp_path):
    ran = forks_of(planted(key_error), 100, tmp_path)
    assert ran.cases == 100
    assert ran.outcomes["read"] + ran.outcomes["finding"] == 100
    assert ran.outcomes["finding"] == len(ran.findings) > 1


def test_a_crash_counts_the_cases_before_it(tmp_path):
    first = next(i for i in range(100) if max(numbers(Seeded(1, i))["numbers"], default=0) > 60)
    ran = forks_of(planted(abort), 100, tmp_path)
    assert ran.cases == first + 1
    assert ran.outcomes == {"read": first, "finding": 1} if first else {"finding": 1}
    assert "Fatal Python error: Aborted" in ran.findings[0]["traceback"]


def forks_of(target, count, tmp_path):
    child = forks.start(target, [partial(Seeded, 1, index) for index in range(count)], tmp_path / "fork")
    return forks.result(target, tmp_path / "fork", os.waitpid(child, 0)[1])


def test_a_campaign_reports_a_cause_once_and_counts_it(tmp_path, capsys):
    sound = Target("files", "sound", "bits", numbers, lambda case, folder: sentence_or(lambda: refuse()), weight=1)

    def refuse():
        raise InputError("the file is damaged")

    report = campaign.run([planted(key_error), sound], 0.03, 5, tmp_path / "work", jobs=2)
    assert len(report.findings) == 1
    (finding,) = report.findings.values()
    assert finding["count"] > 1
    assert finding["shrunk"] == {"numbers": [61]}
    assert set(report.outcomes[sound.title]) == {"refused"}
    rows = command.rows(report, [planted(key_error), sound])
    assert [(row["what"], len(row["findings"]), list(row["parts"])) for row in rows] == [("files", 1, ["planted", "sound"])]
    assert rows[0]["cases"] == sum(report.cases.values())
    assert "KeyError" in capsys.readouterr().out


def test_the_same_seed_makes_the_same_cases():
    assert [numbers(Seeded(3, "x", i)) for i in range(20)] == [numbers(Seeded(3, "x", i)) for i in range(20)]
    first = Seeded(3, "x", 7)
    made = numbers(first)
    assert numbers(Given(first.taken)) == made
    assert numbers(Given([])) == {"numbers": []}


def test_hypothesis_draws_from_the_same_makers():
    from hypothesis import find

    assert find(draw.strategy(numbers), lambda case: sum(case["numbers"]) > 100)["numbers"] in ([2, 99], [99, 2])


@pytest.mark.parametrize("name", ["a reader without a check", "a reader that unpickles"])
def test_a_planted_reader_is_caught(name, tmp_path):
    """One that raises whatever JSON raises, and one that runs what it reads."""

    def careless(folder):
        return json.loads((folder / "config.json").read_text())["iterations"] + 1

    def trusting(folder):
        torch.load(folder / "zip.pth", weights_only=False)

    careless_kind = kinds.Kind("careless", "tables", "config.json", "json", careless)
    trusting_kind = kinds.Kind("trusting", "checkpoints", "zip.pth", "zip", trusting)
    kind, part, wanted = (
        (careless_kind, "numbers", "Error") if name == "a reader without a check" else (trusting_kind, "payload", "payload was executed")
    )
    (target,) = [target for target in files.targets(tmp_path, kinds=[kind]) if target.part == part]
    keys = [finding["key"] for finding in forks_of(target, 100, tmp_path).findings]
    assert any(wanted in key for key in keys), keys


def test_damage_is_what_it_says():
    data = json.dumps({"grid": [2, 3], "mean": [0.5]}).encode()
    assert json.loads(edits.damaged(data, [["json", ["grid", 1], "7"]]))["grid"] == [2, 7]
    assert b'"mean": [NaN]' in edits.damaged(data, [["json", ["mean", 0], "NaN"]])
    assert edits.damaged(data, [["json", ["nowhere"], "7"]]) != data  # a key that is set
    assert edits.damaged(data, [["json drop", ["nowhere"]]]) == data
    assert edits.damaged(data, [["cut", 5]]) == data[:5]
    assert edits.damaged(b"\0\0", [["flip", 9, 7]]) == b"\0\x80"
    assert edits.damaged(data, [["form", "fifo"], ["cut", 1]]) == "fifo"


@pytest.mark.parametrize("form", ["json", "safetensors", "zip", "png", "elf"])
def test_every_kind_of_damage_changes_the_file(form, tmp_path):
    from safetensors.torch import save

    samples = {
        "json": b'{"a": [1, 2], "b": {"c": "d"}}',
        "safetensors": save({"x": torch.ones(4), "y": torch.zeros(2, 2)}, {"progress": '{"step": 3}'}),
        "zip": payloads.zip_of({"archive/data.pkl": b"x" * 40, "archive/version": b"3"}),
        "png": payloads.picture_bomb(2, 2),
        "elf": bytes(64) + bytes(56 * 4),
    }
    anatomy = damage.Anatomy(form, samples[form])
    for part in anatomy.damages():
        made = [edits.damaged(anatomy.data, anatomy.make(part, Seeded(part, i))) for i in range(30)]
        changed = sum(each != anatomy.data for each in made)
        assert changed > 15, (part, changed)


@pytest.mark.parametrize("name", [name for name in payloads.pickles() if name not in ("nested", "memo", "long", "string")])
def test_payloads_would_run(name, tmp_path, monkeypatch):
    """Those that are against the reader's trust, not its memory: a reader that unpickles them is caught."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(payloads.pickles()[name])
    assert (tmp_path / payloads.MARK).is_dir()


def test_the_command_says_what_it_did(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "every_target", lambda what, work, only: [planted(key_error)])
    assert command.main(["--minutes", "0.01", "--what", "files", "--no-write", "--out", str(tmp_path / "out"), "--jobs", "1"]) == 1
    said = capsys.readouterr().out
    assert "1 findings" in said
    assert "KeyError" in said
    kept = json.loads((tmp_path / "out" / "findings.jsonl").read_text())
    assert kept["shrunk"] == {"numbers": [61]}
    assert command.main(["--again", str(tmp_path / "out" / "findings.jsonl"), "--no-write"]) == 1
    monkeypatch.setattr(command, "every_target", lambda what, work, only: [planted(lambda: None)])
    assert command.main(["--again", str(tmp_path / "out" / "findings.jsonl"), "--no-write"]) == 0


def test_wrong_needs_an_error_above_that_of_stock():
    truth = torch.ones(4, dtype=torch.float64)
    compare("logits", truth.float() + 1e-6, truth, truth.float(), 1e-4)
    with pytest.raises(Wrong, match="logits is wrong"):
        compare("logits", truth.float() + 1e-2, truth, truth.float(), 1e-4)
    with pytest.raises(Wrong, match="another shape"):
        compare("logits", torch.ones(3), truth, truth, 1e-4)
