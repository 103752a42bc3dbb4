"""Labelled images as a model takes them, and the teacher that is trained on them."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smi.datasets import Sizes, fit, load
from smi.errors import InputError
from smi.models.folder import load_model_folder, record_of
from smi.models.vit import describe
from smi.teachers import digits, train_cifar10
from tests.conftest import small_vit

PLAIN = Sizes(3, (8, 8), (0.0,) * 3, (1.0,) * 3, 3)
CIFAR10 = Path(os.environ.get("SMI_CIFAR10") or Path(__file__).parents[3] / "shared" / "data" / "cifar10")
needs_cifar10 = pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not here: set SMI_CIFAR10 to its folder")


def picture(value, size=(8, 8), mode="RGB"):
    return Image.fromarray(np.full((*size, 3) if mode == "RGB" else size, value, dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cow")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture(50 * label + i).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def parquet_file(path, rows, image="img", label="label"):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def encoded(value):
        buffer = io.BytesIO()
        picture(value).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    parquet.write_table(pa.table({image: [encoded(value) for value, _ in rows], label: [target for _, target in rows]}), path)


def test_class_folders_take_turns(folder):
    images, labels = load(folder, PLAIN)
    assert images.shape == (6, 3, 8, 8)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert images[:, 0, 0, 0].mul(255).round().tolist() == [0, 50, 100, 1, 51, 101]
    assert load(folder, PLAIN, "train")[1].bincount().tolist() == [3, 3, 3]
    assert load(folder, PLAIN, "test", 4)[1].tolist() == [0, 1, 2, 0]
    assert load(folder / "val", PLAIN)[1].tolist() == [0, 1, 2, 0, 1, 2]


def test_folders_named_by_numbers_are_the_labels(tmp_path):
    for label in (0, 2, 10):
        (tmp_path / str(label)).mkdir()
        picture(label).save(tmp_path / str(label) / "a.png")
    assert load(tmp_path, Sizes(3, (8, 8), (0.0,) * 3, (1.0,) * 3))[1].tolist() == [0, 2, 10]


def test_parquet_by_split_and_by_file(tmp_path):
    parquet_file(tmp_path / "test-00000.parquet", [(0, 2), (255, 0)])
    parquet_file(tmp_path / "train.parquet", [(51, 1)], image="image")
    images, labels = load(tmp_path, PLAIN)
    assert labels.tolist() == [2, 0]
    assert images[:, 0, 0, 0].tolist() == [0, 1]
    assert load(tmp_path / "train.parquet", PLAIN)[1].tolist() == [1]


def test_pixels_in_the_models_channels_size_and_statistics():
    white = torch.ones(1, 4, 4)
    out = fit(white, Sizes(3, (8, 8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    assert out.shape == (3, 8, 8)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([2.5, 2.4, 7 / 3]))
    assert fit(torch.rand(3, 8, 8), Sizes(1, (8, 8), (0.0,), (1.0,))).shape == (1, 8, 8)
    middle = torch.zeros(1, 16, 32)
    middle[:, :, 12:20] = 1
    assert fit(middle, Sizes(1, (8, 8), (0.0,), (1.0,)))[0, :, 3:5].min() > 0.9  # the sides are cut off, not squeezed in
    cropped = fit(middle, Sizes(1, (8, 8), (0.0,), (1.0,), crop=0.5))
    assert cropped.mean() > 0.9


def test_digits_are_those_of_the_teacher():
    pytest.importorskip("sklearn")
    images, labels = load("digits", digits())
    assert images.shape == (450, 1, 32, 32)
    with torch.no_grad():
        assert (digits()(images).argmax(1) == labels).double().mean() > 0.97
    assert load("digits", small_vit(num_classes=10), "train", 7)[0].shape == (7, 3, 16, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: "nowhere", "no labelled images at 'nowhere'"),
        (lambda path: picture(0).save(path / "a.png") or path, "pictures without labels"),
        (lambda path: path, "no pictures"),
        (lambda path: (path / "ant").mkdir() or path, "holds no labelled images"),
        (lambda path: (path / "train" / "ant").mkdir(parents=True) or path, "none for the test split"),
        (lambda path: (path / "ant").mkdir() or (path / "ant" / "a.png").write_text("no") and path, "cannot be read as a picture"),
        (lambda path: parquet_file(path / "test.parquet", [(0, 3)]) or path, "labels from 3 to 3, but the model has 3 classes"),
        (lambda path: parquet_file(path / "test.parquet", [(0, None), (1, 1)]) or path, "without a label"),
        (lambda path: parquet_file(path / "test.parquet", [(0, 1)], label="class") or path, "must have columns img"),
        (lambda path: (path / "test.parquet").write_text("no") and path, "cannot be read as labelled images"),
        (lambda path: "cifar10", "set SMI_CIFAR10"),
    ],
)
def test_data_that_cannot_be_used(make, message, tmp_path, monkeypatch):
    monkeypatch.delenv("SMI_CIFAR10", raising=False)
    with pytest.raises(InputError, match=message):
        load(make(tmp_path), PLAIN)


def test_what_is_asked_for_wrongly(folder):
    with pytest.raises(InputError, match="split must be train or test, got 'dev'"):
        load(folder, PLAIN, "dev")
    with pytest.raises(InputError, match="limit must be at least 1"):
        load(folder, PLAIN, limit=0)
    (folder / "cifar-10-batches-py").mkdir()
    with pytest.raises(InputError, match="no complete CIFAR-10"):
        load(folder, PLAIN)


@needs_cifar10
def test_real_cifar10(monkeypatch):
    monkeypatch.setenv("SMI_CIFAR10", str(CIFAR10))
    images, labels = load("cifar10", Sizes(3, (32, 32), (0.0,) * 3, (1.0,) * 3, 10), "test", 300)
    assert images.shape == (300, 3, 32, 32)
    assert len(labels.unique()) == 10
    assert 0.4 < images.mean() < 0.55


# the teacher


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Twenty plain pictures in ten classes for each split, and a recipe small enough for a test."""
    for split in ("train", "test"):
        for label in range(10):
            (tmp_path / "data" / split / str(label)).mkdir(parents=True)
            for i in range(2):
                picture(25 * label + i, (32, 32)).save(tmp_path / "data" / split / str(label) / f"{i}.png")
    architecture = {"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 16, "depth": 2, "num_heads": 2}
    recipe = train_cifar10.Recipe(architecture, epochs=4, batch_size=10, lr=1e-3, mixup=0.5, kept=(0.25, 0.5), kept_late=(0.25, 1.0))
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
    early = [train_cifar10.kept_share(recipe, step, 100, 0) for step in range(70)]
    late = [train_cifar10.kept_share(recipe, step, 100, 0) for step in range(70, 100)]
    assert 0.25 <= min(early) < max(early) <= 0.5 < max(late) <= 1.0


def test_labels_are_smoothed_at_first_only(tiny):
    recipe = train_cifar10.PRESETS["cpu"]
    data = train_cifar10.read(tiny[1], torch.device("cpu"))
    recipe = replace(recipe, mixup=0.0)
    early, late = (train_cifar10.batch(data, recipe, step, 100, 0)[1].max(1).values for step in (69, 70))
    torch.testing.assert_close(early, torch.full_like(early, 1 - 0.9 * recipe.smoothing))
    assert recipe.smoothing > 0
    assert bool((late == 1).all())


def test_the_jitter_of_a_batch_moves_and_mirrors_each_image():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(50, 1, 8, 8)
    out = train_cifar10._jitter(images, 0, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(image, images[0].float().flip(-1)) for image in out]
    assert all(mirror or torch.equal(image, images[0].float()) for mirror, image in zip(mirrored, out, strict=True))
    assert 10 < sum(mirrored) < 40
    moved = train_cifar10._jitter(images, 2, torch.Generator().manual_seed(0))
    assert len({tuple(image[0, 4, 4:5].tolist()) for image in moved}) > 5


def test_the_committed_record_is_of_this_recipe():
    path = Path(train_cifar10.__file__).parent / "cifar10.json"
    if not path.exists():
        pytest.skip("no training record is committed")
    record = json.loads(path.read_text())
    assert record["training"] == json.loads(json.dumps(train_cifar10._plain(train_cifar10.PRESETS["cpu"])))
    assert record["test_accuracy_by_share_of_patches_kept"]["1.0"] >= 0.6
