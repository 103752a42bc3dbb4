"""Result files: named after the device, appended to, read by run."""

from bench.measuring import record, rows_file


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


def test_a_killed_process_costs_at_most_the_row_it_was_writing(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"i": 0}\n{"i": 1, "unfin')
    rows_file.append(path, [{"i": 2}])
    assert [row["i"] for row in rows_file.read(path)] == [0, 2]


def test_rows_go_to_a_folder_of_choice(tmp_path):
    assert record.results_file("NVIDIA H200", tmp_path) == tmp_path / "nvidia-h200.jsonl"
