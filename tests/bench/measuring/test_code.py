"""Which code is measured: by git, or by the file that was packed where there is no git."""

import json
import shutil

import pytest

from bench.measuring import code

pytestmark = pytest.mark.fast


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit: code, and rows."""
    for name in ("bench/results/x.jsonl", "smi/code.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1\n")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init"], ["add", "."], [*author, "commit", "-m", "first"]):
        assert code.git(*arguments) is not None
    return tmp_path


def test_appended_rows_do_not_make_the_code_dirty(checkout):
    """What is measured is the code: rows that a run has appended before leave it as it is, a changed line does not."""
    (checkout / "bench/results/x.jsonl").write_text("1\n2\n")
    assert not code.commit()["dirty"]
    (checkout / "smi/code.py").write_text("2\n")
    assert code.commit()["dirty"]


def test_without_git_the_packed_file_says_which_commit_it_is(checkout):
    """A copy without .git is as clean as what was packed, until one of its files is changed."""
    about = code.commit()
    (checkout / code.PACKED).parent.mkdir()
    (checkout / code.PACKED).write_text(json.dumps(about | {"digest": code.digest()}))
    shutil.rmtree(checkout / ".git")
    assert code.commit() == about == {"commit": about["commit"], "dirty": False}
    assert len(about["commit"]) == 40
    (checkout / "bench/results/x.jsonl").write_text("1\n2\n")
    assert not code.commit()["dirty"]
    (checkout / "smi/more.py").write_text("3\n")
    assert code.commit() == {"commit": about["commit"], "dirty": True}


def test_what_was_dirty_when_packed_stays_so(checkout):
    (checkout / code.PACKED).parent.mkdir()
    (checkout / code.PACKED).write_text(json.dumps({"commit": "0", "dirty": True, "digest": code.digest()}))
    shutil.rmtree(checkout / ".git")
    assert code.commit() == {"commit": "0", "dirty": True}


def test_a_copy_of_which_nothing_is_known_is_dirty(checkout):
    shutil.rmtree(checkout / ".git")
    assert code.commit() == {"commit": "unknown", "dirty": True}
