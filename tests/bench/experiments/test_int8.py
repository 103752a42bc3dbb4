"""The int8 benchmark: what it shows of a trained model, and models that learn the digits first."""

import json

import pytest

from bench.evidence.learning import learn
from bench.experiments import int8, result_rows
from smi.datasets import load
from smi.distillation import small_student
from smi.models.by_name import load_model
from smi.models.folder import record_of
from smi.quantization import accuracy

QUICK = ["--batch=2", "--rounds=2", "--iterations=7", "--threads=1"]


@pytest.mark.slow
def test_a_row_of_the_digits_teacher(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    monkeypatch.setattr(result_rows, "results_file", lambda device: results)
    int8.main(["--model", "digits", *QUICK])
    (row,) = map(json.loads, results.read_text().splitlines())
    assert row["accuracy_float32"] > 0.98
    assert abs(row["accuracy_int8"] - row["accuracy_simulated"]) <= 0.01
    assert row["same_in_new_process"]
    assert row["speedup"] > 0


def test_learning_the_digits_in_a_few_steps():
    student = small_student(load_model("digits"), 0)
    real = load("digits", student, "test")
    before = accuracy(student.eval(), *real)
    learn(student.train(), *load("digits", student, "train"), steps=100, kept=(0.25, 0.5), noise=0.1)
    assert accuracy(student.eval(), *real) > max(0.5, 2 * before)


def test_what_has_learned_is_kept(tmp_path):
    first = int8.trained("vit_tiny_patch16_224", 0, tmp_path)
    kept = list(tmp_path.iterdir())
    assert [path.name for path in kept] == ["vit_tiny_patch16_224-0"]
    written = (kept[0] / "model.safetensors").stat().st_mtime_ns
    again = int8.trained("vit_tiny_patch16_224", 0, tmp_path)
    assert (kept[0] / "model.safetensors").stat().st_mtime_ns == written
    assert all((a == b).all() for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert first.num_classes == 10


def test_a_model_that_learned_otherwise_learns_anew(tmp_path, monkeypatch):
    int8.trained("vit_tiny_patch16_224", 0, tmp_path)
    monkeypatch.setitem(int8.LEARNING, "clip", 2.0)
    int8.trained("vit_tiny_patch16_224", 0, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert record_of(folder)["clip"] == 2.0
