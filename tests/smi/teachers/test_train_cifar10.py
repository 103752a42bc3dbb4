"""The command that trains a teacher on CIFAR-10: resumed, loaded, and what its batches are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from smi.models.folder import load_model_folder, record_of
from smi.models.vit import describe
from smi.teachers import train_cifar10
from smi.teachers.cifar10_batches import _jitter, batch, read_cifar10
from smi.teachers.cifar10_recipe import Recipe, kept_share

pytestmark = pytest.mark.fast


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Twenty plain pictures in ten classes for each split, and a recipe small enough for a test."""
    for split in ("train", "test"):
        for label in range(10):
            (tmp_path / "data" / split / str(label)).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (32, 32), (25 * label + i,) * 3).save(tmp_path / "data" / split / str(label) / f"{i}.png")
    architecture = {"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 16, "depth": 2, "num_heads": 2}
    recipe = Recipe(architecture, epochs=4, batch_size=10, lr=1e-3, mixup=0.5, kept=(0.25, 0.5), kept_late=(0.25, 1.0))
    monkeypatch.setattr(train_cifar10, "PRESETS", {"cpu": recipe})
    monkeypatch.setattr(train_cifar10, "SAVE_EVERY", 0.0)
    return ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--device", "cpu"]


def test_a_teacher_is_trained_resumed_and_loaded(tiny, tmp_path, monkeypatch, capsys):
    assert train_cifar10.main([*tiny, "--output", str(tmp_path / "whole")]) == 0
    update, taken = train_cifar10._update, []

    def killed(*args):
        if len(taken) == 5:
            taken.append("killed")
            raise KeyboardInterrupt
        taken.append(args[4])
        return update(*args)

    monkeypatch.setattr(train_cifar10, "_update", killed)
    with pytest.raises(KeyboardInterrupt):
        train_cifar10.main(tiny)
    assert train_cifar10.main(tiny) == 0
    assert taken == [0, 1, 2, 3, 4, "killed", 5, 6, 7]
    whole, resumed = load_model_folder(tmp_path / "whole"), load_model_folder(tmp_path / "out")
    assert all(torch.equal(weight, resumed.state_dict()[name]) for name, weight in whole.state_dict().items())
    record = record_of(tmp_path / "out")
    assert record["train_images"] == 20
    assert set(record["test_accuracy_by_share_of_patches_kept"]) == {"1.0", "0.75", "0.5", "0.25"}
    assert describe(resumed).mean == tuple(record["mean"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.json", "model.safetensors"]
    capsys.readouterr()
    assert train_cifar10.main(tiny) == 2
    assert "holds a trained model" in capsys.readouterr().err


def test_a_state_of_another_recipe_is_refused(tiny, monkeypatch, capsys):
    monkeypatch.setattr(train_cifar10, "save_model", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train_cifar10.main(tiny)
    assert train_cifar10.main([*tiny, "--seed", "1"]) == 2
    assert "another recipe, seed or data" in capsys.readouterr().err


def test_patches_are_dropped_in_training_and_kept_shares_stay_in_range(tiny):
    recipe = train_cifar10.PRESETS["cpu"]
    early = [kept_share(recipe, step, 100, 0) for step in range(70)]
    late = [kept_share(recipe, step, 100, 0) for step in range(70, 100)]
    assert 0.25 <= min(early) < max(early) <= 0.5 < max(late) <= 1.0


def test_labels_are_smoothed_at_first_only(tiny):
    recipe = train_cifar10.PRESETS["cpu"]
    data = read_cifar10(tiny[1], torch.device("cpu"))
    recipe = replace(recipe, mixup=0.0)
    early, late = (batch(data, recipe, step, 100, 0)[1].max(1).values for step in (69, 70))
    torch.testing.assert_close(early, torch.full_like(early, 1 - 0.9 * recipe.smoothing))
    assert recipe.smoothing > 0
    assert bool((late == 1).all())


def test_the_jitter_of_a_batch_moves_and_mirrors_each_image():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(50, 1, 8, 8)
    out = _jitter(images, 0, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(image, images[0].float().flip(-1)) for image in out]
    assert all(mirror or torch.equal(image, images[0].float()) for mirror, image in zip(mirrored, out, strict=True))
    assert 10 < sum(mirrored) < 40
    moved = _jitter(images, 2, torch.Generator().manual_seed(0))
    assert len({tuple(image[0, 4, 4:5].tolist()) for image in moved}) > 5


def test_the_committed_record_is_of_this_recipe():
    path = Path(train_cifar10.__file__).parent / "cifar10.json"
    if not path.exists():
        pytest.skip("no training record is committed")
    record = json.loads(path.read_text())
    assert record["training"] == json.loads(json.dumps(train_cifar10._as_json(train_cifar10.PRESETS["cpu"])))
    assert record["test_accuracy_by_share_of_patches_kept"]["1.0"] >= 0.6
