"""Labelled images as a model takes them."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smi.datasets import Sizes, fit, load
from smi.errors import InputError
from smi.teachers import digits
from tests.conftest import small_vit

pytestmark = pytest.mark.fast

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
