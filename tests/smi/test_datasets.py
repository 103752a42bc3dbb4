"""Labelled images as a model takes them."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import smi
from smi.cli.main import run
from smi.datasets import Sizes, fit, load
from smi.distillation import small_student
from smi.errors import InputError
from smi.models.by_name import load_model
from smi.models.folder import load_model_folder, save_model
from smi.models.view import View
from smi.models.vit import describe
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
    cropped = fit(middle, Sizes(1, (8, 8), (0.0,), (1.0,), view=View(0.5)))
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
    with pytest.raises(InputError, match="limit must be a whole number from 1"):
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


SEEN = {"crop_pct": 0.8, "crop_mode": "center", "interpolation": "bilinear"}


@pytest.fixture
def cropping():
    """A ViT of 16 pixels that sees the middle of a larger picture."""
    model = small_vit()
    model.pretrained_cfg |= SEEN
    return model


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for label in range(3):
        (tmp_path / "pictures" / str(label)).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "pictures" / str(label) / "a.png")
    return tmp_path / "pictures"


def test_the_models_view_by_every_path(cropping, pictures, tmp_path):
    """The model, its description, with statistics given, and a student of its kind, in memory and from a folder: the same pixels."""
    expected, _ = load(pictures, cropping)
    mean, std = (cropping.pretrained_cfg[name] for name in ("mean", "std"))
    student = small_student(cropping)
    save_model(student, tmp_path / "student")
    given = [describe(cropping), describe(cropping, mean=mean, std=std), Sizes.of(cropping), student, load_model_folder(tmp_path / "student")]
    assert all(torch.equal(load(pictures, each)[0], expected) for each in given)
    plain = small_vit()
    assert not torch.equal(load(pictures, plain)[0], expected)
    assert Sizes.of(cropping).record() == {"image_size": [16, 16], "mean": list(mean), "std": list(std), **SEEN}


def test_commands_say_how_pictures_were_made_ready(cropping, pictures, tmp_path, capsys):
    """evaluate --against, also with --mean and --std: the numbers of the Python interface."""
    save_model(cropping, tmp_path / "model")
    smi.invert(cropping, method="gaussian", num_images=3, labels=[0, 1, 2], output=tmp_path / "images", progress=False)
    real = load(pictures, cropping)
    expected = smi.evaluate(smi.SparseImages.load(tmp_path / "images"), cropping, real=real).record()["likeness"]
    model = ["--model", str(tmp_path / "model"), "--json"]
    statistics = ["--mean", "0.5,0.4,0.3", "--std", "0.2,0.25,0.3"]
    for options in (model, [*model, *statistics]):
        assert run(["evaluate", str(tmp_path / "images"), "--against", str(pictures), *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["likeness"] == expected
        assert {**SEEN, **found["against"]["preprocessing"]} == found["against"]["preprocessing"]


@pytest.mark.slow
def test_quantize_calibrates_with_the_models_view(cropping, pictures, tmp_path, capsys):
    pytest.importorskip("torchao")
    save_model(cropping, tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--json", "--mean", "0.5,0.4,0.3", "--std", "0.2,0.25,0.3"]
    wanted = smi.quantize(cropping, load(pictures, cropping, "train")[0])
    assert run(["quantize", "--images", str(pictures), "-o", str(tmp_path / "q"), "--w-bits", "4", *options]) == 0
    assert json.loads(capsys.readouterr().out)["preprocessing"]["crop_pct"] == 0.8
    assert smi.load_quantized(tmp_path / "q").inputs() == wanted.inputs()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("size", "crop"), [((50, 40), 0.875), ((40, 64), 1.0), ((33, 35), 0.9)])
def test_views_are_timms(crop_mode, size, crop):
    """Beside timm's transform of the same picture, which rounds to bytes in between."""
    from timm.data import create_transform

    smooth = np.add.outer(np.sin(np.arange(size[0]) / 6), np.cos(np.arange(size[1]) / 5)) / 4 + 0.5
    image = Image.fromarray((255 * np.stack([smooth, smooth**2, 1 - smooth], axis=2)).astype(np.uint8))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    timms = create_transform((3, 32, 32), interpolation="bicubic", mean=mean, std=std, crop_pct=crop, crop_mode=crop_mode)(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    ours = fit(pixels, Sizes(3, (32, 32), mean, std, view=View(crop, crop_mode)))
    assert ours.shape == timms.shape
    assert (ours - timms).abs().mean() < 0.03


def test_a_picture_too_long_to_scale_is_refused():
    """Before it takes the memory: a line of a few bytes in a file becomes gigabytes once its shorter side is the model's."""
    with pytest.raises(InputError, match="1x60000 pixels is too long: scaled for the model it would be 224x"):
        fit(torch.zeros(3, 1, 60_000), Sizes(3, (224, 224), (0.5,) * 3, (0.5,) * 3, view=View()))


@pytest.mark.parametrize("cfg", [{"crop_pct": 0}, {"crop_pct": None}, {}, {"crop_mode": "", "interpolation": None}], ids=str)
def test_what_a_model_does_not_tell_of_its_view(cfg):
    assert View.of(cfg) == View()


@pytest.mark.parametrize(
    ("cfg", "word"),
    [
        ({"crop_pct": float("nan")}, "crop_pct"),
        ({"crop_pct": -1}, "crop_pct"),
        ({"crop_mode": "middle"}, "crop_mode"),
        ({"interpolation": "lanczos"}, "interpolation"),
    ],
)
def test_views_that_are_not_known_are_refused_where_pictures_are_read(cfg, word, pictures):
    model = small_vit()
    model.pretrained_cfg |= cfg
    assert len(smi.invert(model, method="gaussian", num_images=1, progress=False)) == 1
    with pytest.raises(InputError, match=next(iter(cfg))):
        load(pictures, model)


FILES = [
    ["validation.parquet"],
    ["val.parquet"],
    ["valid-00000-of-00001.parquet"],
    ["validation-0.parquet"],
    ["test.parquet", "validation.parquet"],
    ["testing.parquet", "val_0.parquet"],
]


@pytest.mark.parametrize("names", FILES, ids=str)
def test_a_parquet_file_is_read_once(names, tmp_path):
    for number, name in enumerate(names):
        parquet_file(tmp_path / name, [(number, 0), (number, 1)])
    assert len(load(tmp_path, PLAIN)[0]) == 2


def test_two_files_of_a_split_are_read_once_each(tmp_path):
    for number in (1, 0):
        parquet_file(tmp_path / f"validation-0000{number}-of-00002.parquet", [(number, number)])
    assert load(tmp_path, PLAIN)[1].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("label", "message"),
    [(-1, "split is not labelled"), (1.5, "whole numbers as labels"), (True, "whole numbers as labels"), ("ant", "whole numbers as labels")],
)
def test_labels_that_are_none(label, message, tmp_path):
    parquet_file(tmp_path / "test.parquet", [(0, label)])
    with pytest.raises(InputError, match=message):
        load(tmp_path, Sizes(3, (8, 8), (0.0,) * 3, (1.0,) * 3))


def test_hidden_files_are_no_pictures(folder):
    (folder / "val" / "ant" / "._0.png").write_text("left by another system")
    (folder / "val" / "bee" / ".previews").mkdir()
    picture(9).save(folder / "val" / "bee" / ".previews" / "0.png")
    assert load(folder, PLAIN)[1].bincount().tolist() == [2, 2, 2]


IMAGENET = Path(__file__).parents[3] / "shared" / "data" / "imagenet"


@pytest.mark.slow
@pytest.mark.skipif(not IMAGENET.is_dir(), reason="the real ImageNet teacher and images are not here (shared/data/imagenet)")
def test_a_real_teacher_on_real_images():
    """By every path the same, and what timm's own transform gives."""
    from pyarrow import parquet
    from timm.data import create_transform, resolve_model_data_config

    model = load_model("deit_tiny_patch16_224", checkpoint=IMAGENET / "deit_tiny_patch16_224.safetensors")
    images, labels = load(IMAGENET, model, limit=40)
    assert torch.equal(load(IMAGENET, describe(model), limit=40)[0], images)
    transform = create_transform(**resolve_model_data_config(model))
    rows = parquet.read_table(IMAGENET / "validation.parquet").slice(0, 40).to_pylist()
    timms = torch.stack([transform(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows])
    assert (images - timms).abs().mean() < 0.01
    with torch.no_grad():
        ours, theirs = ((model(each).argmax(1) == labels).sum().item() for each in (images, timms))
    assert abs(ours - theirs) <= 2
    assert ours >= 28


def test_a_picture_that_claims_too_many_pixels_is_refused_unread(tmp_path):
    (tmp_path / "0").mkdir()
    picture = Image.new("L", (1, 1))
    picture.save(tmp_path / "0" / "a.bmp")
    data = bytearray((tmp_path / "0" / "a.bmp").read_bytes())
    data[18:26] = (10_000).to_bytes(4, "little") * 2  # width and height of the header
    (tmp_path / "0" / "a.bmp").write_bytes(data)
    with pytest.raises(InputError, match="10000x10000 pixels, more than"):
        load(tmp_path, Sizes(1, (8, 8), (0.5,), (0.5,)))


def test_a_picture_that_claims_more_than_its_file_holds_is_refused_unread(tmp_path):
    """A TIFF of 332 bytes says that it is 8 x 8,355,840 pixels; Pillow would fill what is missing."""
    file = tmp_path / "0" / "one.tiff"
    file.parent.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(file)
    content = bytearray(file.read_bytes())
    content[29:33] = bytes.fromhex("0000807f")
    file.write_bytes(content)
    with pytest.raises(InputError, match="8x8355840 pixels, more than .* than its 332 bytes can hold"):
        load(tmp_path, Sizes(3, (8, 8), (0.5,) * 3, (0.5,) * 3))


def test_a_pipe_is_no_picture(tmp_path):
    (tmp_path / "0").mkdir()
    os.mkfifo(tmp_path / "0" / "a.png")
    with pytest.raises(InputError, match="is not a file"):
        load(tmp_path, Sizes(1, (8, 8), (0.5,), (0.5,)))
