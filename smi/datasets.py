"""Labelled real images, prepared as a model takes them: to evaluate with, to calibrate with, to compare with.

digits            scikit-learn's digits in the split that the embedded teacher was trained with
a folder          one folder of pictures per class, under FOLDER or FOLDER/<split>
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .models import ViT, describe

SPLITS = ("train", "test")
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def load(source: str | Path, model: nn.Module, split: str = "test", limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Labelled images as `model` takes them.

    source: "digits", or a path. split: "train" or "test". limit: at most so many images, the first ones. Returns normalised pixels
    float32 [N, C, H, W] and labels int64 [N], which are classes of the model. Raises InputError where there is no such data, an image has no label,
    or a label is no class of the model.
    """
    if split not in SPLITS:
        raise InputError(f"split must be {' or '.join(SPLITS)}, got '{split}'")
    vit = describe(model)
    images, labels = _digits(vit, split) if str(source) == "digits" else _pictures(vit, model, Path(source), split, limit)
    images, labels = images[:limit], labels[:limit]
    if not len(images):
        raise InputError(f"{source} holds no labelled images")
    if not 0 <= int(labels.min()) <= int(labels.max()) < vit.num_classes:
        given = f"{source} has labels from {int(labels.min())} to {int(labels.max())}"
        raise InputError(f"{given}, but {vit.name} has {vit.num_classes} classes: 0 to {vit.num_classes - 1}")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (vit.mean, vit.std))
    return (images - mean) / std, labels


def _digits(vit: ViT, split: str) -> tuple[Tensor, Tensor]:
    try:
        from .teachers.train_digits import load_digits

        train_images, train_labels, test_images, test_labels = load_digits()
    except ImportError as error:
        raise InputError("the digits need scikit-learn: pip install scikit-learn") from error
    images, labels = (train_images, train_labels) if split == "train" else (test_images, test_labels)
    if images.shape[2:] != vit.image_size:
        images = F.interpolate(images, size=vit.image_size, mode="bilinear", align_corners=False)
    return images.expand(-1, vit.channels, -1, -1), labels


def _pictures(vit: ViT, model: nn.Module, path: Path, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Pixels [N, C, H, W] as fractions of white: the short side resized, the middle cut out, as the model's configuration says."""
    from timm.data import create_transform

    cfg = getattr(model, "pretrained_cfg", None) or {}
    transform = create_transform(
        (vit.channels, *vit.image_size),
        interpolation=cfg.get("interpolation", "bicubic"),
        crop_pct=cfg.get("crop_pct", 1.0),
        mean=(0.0,) * vit.channels,
        std=(1.0,) * vit.channels,
    )
    images, labels = [], []
    for picture, label in _read(path, split):
        if limit is not None and len(images) >= limit:
            break
        images.append(transform(picture.convert("L" if vit.channels == 1 else "RGB")))
        labels.append(label)
    if not images:
        return torch.empty(0, vit.channels, *vit.image_size), torch.empty(0, dtype=torch.int64)
    return torch.stack(images), torch.tensor(labels)


def _read(path: Path, split: str) -> Iterator[tuple]:
    """(PIL image, label) of every image at `path`."""
    if path.is_dir():
        return _read_folder(path / split if (path / split).is_dir() else path)
    raise InputError(f"no labelled images at '{path}': give 'digits' or a folder with one folder of pictures per class")


def _read_folder(folder: Path) -> Iterator[tuple]:
    """Class folders in the order of their names: of their numbers, where all names are whole numbers, which then are the labels."""
    from PIL import Image

    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        pictures = any(entry.suffix.lower() in PICTURES for entry in folder.iterdir())
        raise InputError(f"{folder} holds {'pictures without labels' if pictures else 'no pictures'}: put those of each class in a folder of its own")
    numbered = all(entry.name.isascii() and entry.name.isdecimal() for entry in classes)
    for place, entry in enumerate(sorted(classes, key=lambda entry: int(entry.name)) if numbered else classes):
        for file in sorted(entry.rglob("*")):
            if file.suffix.lower() in PICTURES:
                try:
                    with Image.open(file) as picture:
                        yield picture, int(entry.name) if numbered else place
                except OSError as error:
                    raise InputError(f"{file} cannot be read as a picture: {error}") from error
