"""Labelled real images, to train teachers and to measure with: `load` gives them as a model takes them.

digits            scikit-learn's digits in the split that the embedded teacher was trained with
cifar10, imagenet at the path in the environment variable SMI_CIFAR10 or SMI_IMAGENET, in any of the forms below
a Parquet file    columns img (or image) and label, as the `datasets` library writes them; or a folder of <split>*.parquet
torchvision's     the folder in which torchvision keeps CIFAR-10
a folder          one folder of pictures per class, under FOLDER or FOLDER/<split>
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .models.levels import Model, read_model
from .models.view import MOST_PIXELS, View
from .plain import one_of, path, whole

SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}  # and how files and folders name them
VARIABLES = {"cifar10": "SMI_CIFAR10", "imagenet": "SMI_IMAGENET"}  # where a name finds its data
TORCHVISION_CIFAR10 = "cifar-10-batches-py"
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
SMALL, MOST_PER_BYTE = 1 << 22, 2000  # pixels of a picture whose file may be of any size; of a larger one for each byte: formats reach a thousand

Pair = tuple[Tensor, int]  # image [C, H, W] as fractions of white, label


@dataclass(frozen=True)
class Sizes:
    """What a model takes."""

    channels: int
    image_size: tuple[int, int]  # pixels: height, width
    mean: tuple[float, ...]  # of the training images, per channel, as fractions of white
    std: tuple[float, ...]
    num_classes: int | None = None  # None: any
    view: View = View()  # what of a picture the model sees

    @staticmethod
    def of(model: "nn.Module | Model | Sizes") -> "Sizes":
        """The sizes of a supported model."""
        if isinstance(model, Sizes):
            return model
        vit = read_model(model)[0] if isinstance(model, nn.Module) else model
        return Sizes(vit.channels, vit.image_size, vit.mean, vit.std, vit.num_classes, vit.view)

    def record(self) -> dict[str, Any]:
        """How pictures are made ready, for the record of a result, as JSON."""
        return {"image_size": list(self.image_size), "mean": list(self.mean), "std": list(self.std), **self.view.cfg()}


def load(source: str | Path, model: nn.Module | Model | Sizes, split: str = "test", limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised images float32 [N, C, H, W] and labels int64 [N] of one split, "train" or "test", on the CPU, as `model` takes them.

    source: "digits", "cifar10", "imagenet" or a path, as above. limit: at most this many images, the first ones (class folders take turns).
    Smaller pictures are enlarged; larger ones are scaled and cut as the model's `pretrained_cfg` says (crop_pct, crop_mode, interpolation). Raises
    InputError for data that is missing, empty, unlabelled, not readable, or labelled with what is no class of the model.
    """
    split, source = one_of(SPLITS)("split", split), path("source", source)
    limit = None if limit is None else whole(1)("limit", limit)
    sizes = Sizes.of(model)
    images, labels = [], []
    for image, label in islice(_source(source, split), limit):
        images.append(fit(image, sizes))
        labels.append(label)
    if not images:
        raise InputError(f"{source} holds no labelled images of the {split} split")
    targets = torch.tensor(labels)
    if int(targets.min()) < 0:
        raise InputError(f"{source} has labels from {int(targets.min())}: its {split} split is not labelled")
    if sizes.num_classes is not None and not 0 <= int(targets.min()) <= int(targets.max()) < sizes.num_classes:
        given = f"{source} has labels from {int(targets.min())} to {int(targets.max())}"
        raise InputError(f"{given}, but the model has {sizes.num_classes} classes: 0 to {sizes.num_classes - 1}")
    return torch.stack(images), targets


def fit(image: Tensor, sizes: Sizes) -> Tensor:
    """An image [C, H, W] as fractions of white, in the model's channels, size and normalisation."""
    if image.shape[0] != sizes.channels:
        if 1 not in (image.shape[0], sizes.channels):
            raise InputError(f"images have {image.shape[0]} channels, but the model takes {sizes.channels}")
        image = image.expand(sizes.channels, -1, -1) if image.shape[0] == 1 else image.mean(0, keepdim=True)
    image = sizes.view.scale(image, sizes.image_size, sizes.mean)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (sizes.mean, sizes.std))
    return (image - mean) / std


def _source(data: str | Path, split: str) -> Iterator[Pair]:
    """The pictures of a split one after another."""
    if str(data) == "digits":
        return _digits(split)
    if (variable := VARIABLES.get(str(data))) is not None:
        if not os.environ.get(variable):
            raise InputError(f"{data} does not come with the package: set {variable} to its path, or pass the path itself")
        data = os.environ[variable]
    path = Path(data)
    if path.is_file() and path.suffix == ".parquet":
        return _parquet([path])
    if not path.is_dir():
        raise InputError(f"no labelled images at '{data}': give digits, cifar10, a Parquet file, or a folder with one folder of pictures per class")
    for name in SPLITS[split]:
        files = sorted(file for file in path.glob(f"{name}*.parquet") if not file.stem.removeprefix(name)[:1].isalpha())
        if files:
            return _parquet(files)
    if path.name == TORCHVISION_CIFAR10 or (path / TORCHVISION_CIFAR10).is_dir():
        return _torchvision_cifar10(path.parent if path.name == TORCHVISION_CIFAR10 else path, split)
    return _class_folders(path, split)


def _digits(split: str) -> Iterator[Pair]:
    try:
        from .teachers.train_digits import load_digits

        train_images, train_labels, test_images, test_labels = load_digits()
    except ImportError as error:
        raise InputError("digits needs scikit-learn: pip install 'sparse-model-inversion[digits]'") from error
    images, labels = (train_images, train_labels) if split == "train" else (test_images, test_labels)
    return zip(images, labels.tolist(), strict=True)


def _parquet(files: list[Path]) -> Iterator[Pair]:
    """Rows of a picture file's bytes and a label, in the column layout of the `datasets` library."""
    from PIL import Image

    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'sparse-model-inversion[parquet]'") from error
    for file in files:
        try:
            reader = parquet.ParquetFile(file)
            names = set(reader.schema_arrow.names)
            image = next((name for name in ("img", "image") if name in names), None)
            label = next((name for name in ("label", "labels", "fine_label") if name in names), None)
            if image is None or label is None:
                raise InputError(f"{file} must have columns img (or image) and label, it has {', '.join(sorted(names))}")
            for batch in reader.iter_batches(batch_size=256, columns=[image, label]):
                for picture, target in zip(batch[image].to_pylist(), batch[label].to_pylist(), strict=True):
                    if target is None:
                        raise InputError(f"{file} holds an image without a label")
                    if isinstance(target, bool) or not isinstance(target, int):
                        raise InputError(f"{file} must have whole numbers as labels, it has {type(target).__name__} {target!r:.50}")
                    held = picture["bytes"] if isinstance(picture, dict) else picture
                    yield _to_tensor(Image.open(io.BytesIO(held)), len(held)), target
        except InputError:
            raise
        except Exception as error:  # Arrow's readers and Pillow's fail in many ways
            raise InputError(f"{file} cannot be read as labelled images: {str(error).splitlines()[0] if str(error) else error!r}") from error


def _torchvision_cifar10(root: Path, split: str) -> Iterator[Pair]:
    from torchvision.datasets import CIFAR10

    try:
        pictures = CIFAR10(root, train=split == "train")  # checks the files' digests before it reads them
    except RuntimeError as error:
        raise InputError(f"{root} holds no complete CIFAR-10: {str(error).splitlines()[0]}") from error
    for picture, target in pictures:
        yield _to_tensor(picture, picture.width * picture.height), target


def _class_folders(path: Path, split: str) -> Iterator[Pair]:
    """Class folders in the order of their names: of their numbers, where all names are whole numbers, which then are the labels."""
    named = [path / name for name in SPLITS[split] if (path / name).is_dir()]
    others = [name for names in SPLITS.values() for name in names if (path / name).is_dir()]
    if others and not named:
        raise InputError(f"{path} has a folder {others[0]} but none for the {split} split")
    folder = named[0] if named else path
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        found = "pictures without labels" if any(entry.suffix.lower() in PICTURES for entry in folder.iterdir()) else "no pictures"
        raise InputError(f"{folder} holds {found}: put those of each class in a folder of its own")
    numbered = all(entry.name.isascii() and entry.name.isdecimal() for entry in classes)
    classes = sorted(classes, key=lambda entry: int(entry.name)) if numbered else classes
    files = [sorted(file for file in entry.rglob("*") if file.suffix.lower() in PICTURES and not _hidden(file, entry)) for entry in classes]
    labels = [int(entry.name) for entry in classes] if numbered else list(range(len(classes)))
    for turn in zip_longest(*files):
        yield from ((_open(file), label) for file, label in zip(turn, labels, strict=True) if file is not None)


def _hidden(file: Path, folder: Path) -> bool:
    """Whether a file or a folder above it, within `folder`, is hidden: previews, and what another system leaves beside a picture."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _open(path: Path) -> Tensor:
    from PIL import Image

    if not path.is_file():
        raise InputError(f"{path} is not a file: it must be a picture")
    try:
        with Image.open(path) as picture:
            return _to_tensor(picture, path.stat().st_size)
    except Exception as error:  # Pillow's readers fail in many ways on what is no picture, or one larger than any
        raise InputError(f"{path} cannot be read as a picture: {error}") from error


def _to_tensor(picture: Any, size: int) -> Tensor:
    """[C, H, W] as fractions of white, one channel of a grey picture and three of any other. size: bytes of its file."""
    import numpy as np

    if picture.width * picture.height > min(MOST_PIXELS, max(SMALL, MOST_PER_BYTE * size)):  # known before the pixels are
        raise ValueError(f"it claims {picture.width}x{picture.height} pixels, more than {MOST_PIXELS} or than its {size} bytes can hold")
    array = np.array(picture if picture.mode == "L" else picture.convert("RGB"))
    tensor = torch.from_numpy(array).float().div_(255)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
