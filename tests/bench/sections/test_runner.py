"""The runner of sections: what finished is on disk whenever it is cut, the next call goes on, and one bad section costs the others nothing."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from bench.measuring import rows_file
from bench.sections import outputs
from bench.sections import runner as runner_module
from bench.sections.progress import CRASHED, CUT, FAILED, FINISHED, Key, Progress
from tests.bench.sections import fake

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(runner_module, "LEAST_SECONDS", 0.5)


def states(folder: Path) -> dict[Key, str]:
    return Progress(folder / outputs.PROGRESS, "code", "").states()


def results(folder: Path) -> list[dict]:
    return rows_file.read(folder / fake.RESULTS)


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if str(folder) in read(p / "cmdline")]


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def test_cut_at_three_random_moments_nothing_finished_is_lost_or_done_again(tmp_path):
    """Killed with SIGKILL, as a machine that is taken away: all rows of a finished case are on disk, no process stays, the next call goes on."""
    moments = [random.Random(time.time_ns()).uniform(0.4, 2.0) for _ in range(3)]
    known: dict[Key, str] = {}
    for moment in moments:
        process = subprocess.Popen([sys.executable, "-m", "tests.bench.sections.fake", str(tmp_path), "30"], cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 10
        while processes_of(tmp_path) and time.monotonic() < end:
            time.sleep(0.02)
        assert not processes_of(tmp_path), "processes outlive the runner"
        now = states(tmp_path)
        assert all(now[key] == FINISHED for key, state in known.items() if state == FINISHED)
        rows = Counter((row["part"], row["case"]) for row in results(tmp_path))
        assert all(rows[key.part, int(key.case[1:])] >= 2 for key, state in now.items() if key.case and state == FINISHED), moments
        known = now
    assert fake.run(tmp_path, 30) == []
    assert len([key for key in states(tmp_path) if key.case]) == 20
    done = [
        (row["section"], row["part"], row["case"]) for row in rows_file.read(tmp_path / outputs.PROGRESS) if row["case"] and row["state"] == FINISHED
    ]
    assert len(done) == len(set(done)) == 20, "a finished case was done again"
    assert outputs.faults(tmp_path) == []


def test_what_an_earlier_call_finished_is_skipped_while_the_code_is_the_same(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert fake.run(first, 30, fake.PLAN[:2]) == []
    assert fake.run(second, 30, earlier=(first / outputs.PROGRESS,)) == []
    assert "finished by an earlier call: one, two" in capsys.readouterr().out
    assert {row["section"] for row in rows_file.read(second / outputs.PROGRESS)} == {"three"}
    assert fake.run(second, 30, fake.PLAN[:1], code="other", earlier=(first / outputs.PROGRESS,)) == []
    assert len(results(second)) == 20  # three, and one of the other code


def test_a_section_that_hangs_costs_its_limit_and_no_more(tmp_path, capsys):
    """It is ended with its children at its limit, what it had finished stays, and the next section has its whole time."""
    plan = [fake.section("bad", "hanging", limit=2.0), fake.section("good", "slow", limit=4.0)]
    began = time.monotonic()
    assert fake.run(tmp_path, 6.0, plan) == ["bad"]
    assert time.monotonic() - began < 6.0
    found = states(tmp_path)
    assert (found[Key("bad", "all", "first")], found[Key("bad", "all", "hangs")], found[Key("good", "all")]) == (FINISHED, CUT, FINISHED)
    assert not processes_of(tmp_path)
    bad, good = capsys.readouterr().out.splitlines()
    assert bad.startswith("bad: not finished in 2 s, 1 cases; hangs cut. ")
    assert good.startswith("good: finished in ")
    assert "5 cases; all well" in good
    assert fake.run(tmp_path, 3, [fake.section("bad", "hanging", limit=2.0)]) == ["bad"]  # the case that hung comes last now
    assert states(tmp_path)[Key("bad", "all", "last")] == FINISHED


def test_a_process_that_dies_goes_on_without_what_killed_it(tmp_path):
    assert fake.run(tmp_path, 30, [fake.section("bad", "crashing")]) == []
    found = {key.case: state for key, state in states(tmp_path).items()}
    assert found == {"first": FINISHED, "dies": CRASHED, "raises": FAILED, "poisons": FINISHED, "last": FINISHED, None: FINISHED}
    assert [row["case"] for row in results(tmp_path)] == ["first", "poisons", "last"]
    assert "ZeroDivisionError" in (tmp_path / outputs.LOG).read_text()


def test_a_section_may_use_what_those_before_it_left(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(runner_module.Run, "watch", lambda self, parts, end: limits.append(round(end - time.monotonic())))
    plan = [fake.section("a", "slow", 20), fake.section("b", "slow", 30), fake.section("c", "slow", 10)]
    fake.run(tmp_path, 90, plan)
    assert limits == [50, 80, 90]  # nothing took time: only the limits of those that follow are kept
    limits.clear()
    fake.run(tmp_path, 25, plan)
    assert limits == [20, 25, 25]  # too little for all of them: the first ones have theirs


def test_what_is_wrong_is_in_the_line(tmp_path, capsys):
    assert fake.run(tmp_path, 30, [fake.section("bad", "wrong")]) == []
    assert "WRONG: w0, w1, w2, w3 and 2 more" in capsys.readouterr().out


def test_without_time_a_section_is_named_and_not_begun(tmp_path, capsys):
    assert fake.run(tmp_path, 0.1, fake.PLAN[:1]) == ["one"]
    assert capsys.readouterr().out.startswith("one: no time in 0 s")
    assert not results(tmp_path)


def test_files_that_would_not_come_back_are_named(tmp_path):
    assert outputs.faults(tmp_path) == []
    for i in range(outputs.MOST_FILES - 2):
        (tmp_path / f"{i}.txt").touch()
    assert outputs.faults(tmp_path) == []
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/x").touch()
    (tmp_path / "a b").touch()
    (tmp_path / "0.txt").write_bytes(bytes(outputs.MOST_BYTES + 1))
    (tmp_path / "more").touch()
    said = "\n".join(outputs.faults(tmp_path))
    assert all(part in said for part in ("9 files, 8", "deep/x: only plain files", "a b: only plain", f"0.txt: {outputs.MOST_BYTES + 1} bytes"))
    assert not outputs.write_bytes(tmp_path / "trace", bytes(outputs.MOST_BYTES + 1))
    with pytest.raises(outputs.TooLarge, match="0.txt is full"):
        outputs.append(tmp_path / "0.txt", [{}])


def test_the_log_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "LOG_BYTES", 200)
    fake.run(tmp_path, 30, [fake.section("bad", "crashing")])
    assert 0 < (tmp_path / outputs.LOG).stat().st_size <= 200
