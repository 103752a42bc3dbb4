"""The study of ranges: every activation has a kind, and what a case changes reaches the calibration."""

from dataclasses import replace

import pytest
import torch

from bench.experiments import ranges
from bench.experiments.ranges import REAL, Case
from bench.tables.ranges import POINTS, kind_of, title
from smi.models.vit import describe_weights
from smi.quantization.model import Facts
from smi.quantization.recipe import PUBLISHED, Recipe
from tests.conftest import small_vit

pytest.importorskip("torchao")


def test_every_activation_has_its_kind():
    names = Facts.of(describe_weights(small_vit(depth=1)), Recipe(name=PUBLISHED)).activations()
    kinds = {name: kind_of(name) for name in names}
    assert set(kinds.values()) == set(POINTS)
    assert kinds["blocks.0.attn.qkv"] == kinds["blocks.0.mlp.fc1"] == kinds["heads.0"] == "after LayerNorm"
    assert kinds["blocks.0.attn.proj"] == "attention output"
    assert kinds["blocks.0.mlp.fc2"] == "after GELU"


def test_every_case_is_told_apart():
    rows = [vars(case) for case in ranges.CASES]
    assert len({(title(row), row["ranges"], row["percentile"]) for row in rows}) == len(rows)
    assert ranges.CASES[0] == REAL


def test_what_a_case_changes_is_calibrated(tmp_path, monkeypatch):
    """Real images twice as large as the others: the ranges of one kind can be theirs; least squares gives narrower ones."""
    model, draw = small_vit(depth=1), torch.Generator().manual_seed(0)
    pictures = torch.randn(8, 3, 16, 16, generator=draw)
    sizes = {"real": 2.0, "pri4": 1.0}
    monkeypatch.setattr(ranges, "config_of", lambda case, test_images: Config)
    monkeypatch.setattr(ranges, "teacher_of", lambda name: model)
    monkeypatch.setattr(ranges, "images_of", lambda case, folder: [sizes[case.images] * pictures])
    monkeypatch.setattr(ranges, "real_data", lambda config, split: (pictures, torch.arange(8) % 5))
    cases = (REAL, Case("pri4"), Case("pri4", borrowed="scores"), Case("pri4", ranges="mse"))
    rows = ranges.with_differences([ranges.judged(case, tmp_path, Config) for case in cases])
    real, plain, borrowed, least = (row["point_ranges"] for row in rows)
    assert real["tokens"][1] > plain["tokens"][1] > 0 > plain["tokens"][0]
    assert borrowed["blocks.0.attn.scores"] == real["blocks.0.attn.scores"] != plain["blocks.0.attn.scores"]
    assert all(borrowed[name] == plain[name] for name in plain if not name.endswith("scores"))
    assert sum(least[name][1] < 0.98 * plain[name][1] for name in plain) > 3
    assert rows[0]["paired"] == (0.0, 0.0, 1.0)
    assert rows[1]["paired"][0] == pytest.approx(rows[1]["accuracy"] - rows[0]["accuracy"])


def test_images_are_those_of_the_evidence(tmp_path, monkeypatch):
    """Fewer of them, noise on their pixels, noise beside them."""
    import smi

    sparse = smi.invert(small_vit(depth=1), method="smi", num_images=4, iterations=4, progress=False)
    asked = []
    monkeypatch.setenv("SMI_IMAGENET", str(tmp_path))
    monkeypatch.setattr(ranges, "make_images", lambda config, path, row, seed: asked.append((config.iterations, config.tv_weight, path.name)))
    monkeypatch.setattr(ranges.smi.SparseImages, "load", lambda path: sparse)
    case = Case("pri4", 50, count=3, tv_weight=5e-3, noise_images=2)
    (patches, index), noise = ranges.images_of(case, tmp_path)
    assert asked == [(50, 5e-3, "imagenet-50-tv-0.005")]
    assert torch.equal(patches, sparse.patches[:3])
    assert torch.equal(index, sparse.index[:3])
    assert noise.shape == (2, 3, 16, 16)
    ((noisy, _),) = ranges.images_of(replace(case, pixel_noise=0.5, noise_images=0), tmp_path)
    assert (noisy - patches).std() == pytest.approx(0.5, rel=0.1)


class Config:
    teacher = "small"
