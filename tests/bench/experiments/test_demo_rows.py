"""The demo's table as rows of the result files."""

import json

from bench.experiments import demo, result_rows
from bench.tables.experiments import demo as demo_table

SETTINGS = {"model": "digits", "iterations": 200, "batch_size": 12, "tv_weight": 5e-3, "engine": "fused", "dtype": "float32", "seed": 0}
SETTINGS |= {"device": "cpu", "date": "2026-01-02T03:04:05+00:00"}
TABLE = [
    {"method": "SMI", "folder": "smi", "sparsity": 0.78, "images": 84, "seconds": 8.0, "images_per_second": 10.5, "speedup": 2.8}
    | {"flops_speedup": 4.4, "agreement": 0.99, "w8a8": 0.996, "w4a8": 0.995, "transfer": 0.9},
    {"method": "real images", "folder": "real", "sparsity": 0.0, "images": 84, "agreement": 1.0},
]
DEMO = {"format": "smi.demo/1", "table": TABLE, "settings": SETTINGS, "full": 0.996, "downstream": {"transfer": {"steps": 400}}}


def test_a_finished_demo_gives_a_row_a_method(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    monkeypatch.setattr(result_rows, "results_file", lambda device: results)
    (tmp_path / "demo.json").write_text(json.dumps(DEMO))
    assert demo.main([str(tmp_path), "--no-append"]) == 0
    assert not results.exists()
    assert demo.main([str(tmp_path)]) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["kind"], row["method"], row["time"]) for row in rows] == [("demo", name, SETTINGS["date"]) for name in ("SMI", "real images")]
    assert all(row["commit"] and row["torch"] and row["full"] == 0.996 and "folder" not in row for row in rows)
    (table,) = demo_table(rows)
    assert table.title == (
        "84 images of each method by the fused engine in float32, 200 iterations, batches of 12 trajectories, students of 400 steps"
    )
    assert table.lines[0] == ["SMI", "78 %", "8.0", "10.5", "2.80x", "4.40x", "99.0 %", "99.5 %", "90.0 %"]
    (timed,) = demo_table(demo.rows_of(DEMO, seconds=177.2))
    assert timed.title.endswith(", 2 min 57 s in all")


def test_a_folder_without_a_demo_is_refused(tmp_path, capsys):
    assert demo.main([str(tmp_path)]) == 2
    assert "holds no demo.json" in capsys.readouterr().err
