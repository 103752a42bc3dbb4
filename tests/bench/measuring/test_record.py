"""Result files: named after the device, appended to, read by run."""

from bench.measuring import record


def test_results_are_appended(tmp_path):
    for i in range(2):
        record.append(tmp_path / "x.jsonl", [{"i": i}])
    assert (tmp_path / "x.jsonl").read_text() == '{"i": 0}\n{"i": 1}\n'


def test_results_file_is_named_after_the_device():
    assert record.results_file("NVIDIA H200").name == "nvidia-h200.jsonl"
    assert record.results_file("NVIDIA A100-SXM4-80GB").name == "nvidia-a100-sxm4-80gb.jsonl"


def test_the_newest_run_is_one_run():
    rows = [{"run": "1", "a": 1}, {"run": "2", "a": 2}, {"a": 3}, {"run": "2", "a": 4}]
    assert [row["a"] for row in record.newest_run(rows)] == [2, 4]
    assert record.newest_run([{"a": 3}]) == []


def test_appended_rows_do_not_make_the_code_dirty(tmp_path, monkeypatch):
    """What is measured is the code: rows that a run has appended before leave it as it is, a changed line does not."""
    for name in ("bench/results/x.jsonl", "smi/code.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1\n")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init"], ["add", "."], [*author, "commit", "-m", "first"]):
        assert record.git(*arguments) is not None
    (tmp_path / "bench/results/x.jsonl").write_text("1\n2\n")
    assert not record.commit()["dirty"]
    (tmp_path / "smi/code.py").write_text("2\n")
    assert record.commit()["dirty"]
