"""Sparse images for others: PNG files to look at, WebDataset and Parquet shards to train from."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import InputError, RunError
from ..files import output_folder, read_json, replace_file
from ..plain import whole
from .sparse_images import SparseImages

SHARD_IMAGES = 1000
INDEX = "index.json"  # names the files of an export
PICTURE, SHARD = re.compile(r"\d{6,}_label\d+_trajectory\d+_stage\d+\.png"), re.compile(r"images-\d{6,}\.tar")
TABLE = re.compile(r"train-\d{5,}-of-\d{5,}\.parquet")
WHOLE_NUMBER = {"dtype": "int64", "_type": "Value"}
FEATURES = {  # of the Parquet shards, as the datasets library states them in the schema
    "image": {"_type": "Image"},
    **dict.fromkeys(("label", "trajectory", "stage"), WHOLE_NUMBER),
    "retained_patches": {"feature": WHOLE_NUMBER, "_type": "Sequence"},
}


def to_picture(pixels: Tensor) -> Image.Image:
    """[C, H, W] in [0, 1], one channel or at least three, as an 8-bit picture."""
    array = (pixels[:3] if len(pixels) >= 3 else pixels[:1]).mul(255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def export_png(images: SparseImages, folder: str | Path, *, fill: float = 0.5, force: bool = False) -> list[Path]:
    """One PNG per image, dropped patches grey, with its label, trajectory and stage in the name, and index.json with what a picture cannot keep.

    8-bit pictures are for looking at; to compute with the images keep the folder that `save` writes. Raises InputError where the folder is not empty.
    """
    pictures = images.to_pixels(fill)
    numbers = zip(images.labels.tolist(), images.trajectory.tolist(), images.stage.tolist(), strict=True)
    names = [f"{i:06d}_label{label}_trajectory{trajectory}_stage{stage}.png" for i, (label, trajectory, stage) in enumerate(numbers)]

    def write_picture(path: Path, number: int) -> None:
        to_picture(pictures[number]).save(path, format="PNG")

    records = dict(zip(names, images.index.tolist(), strict=True))
    return _export(output_folder(folder, force), "retained_patches", PICTURE, records, {"grid": images.grid}, write_picture)


def export_webdataset(images: SparseImages, folder: str | Path, *, shard_images: int = SHARD_IMAGES, force: bool = False) -> list[Path]:
    """Tar shards of at most shard_images samples: patches.npy (float32 [n, C, p, p]), index.npy (int64 [n]), cls (the label) and json (trajectory,
    stage, grid).

    index.json names the shards and how many images each holds. Raises InputError where the folder is not empty or the webdataset package is missing.
    """
    try:
        import webdataset
    except ImportError as error:
        raise InputError("exporting WebDataset shards needs the webdataset package: pip install 'sparse-model-inversion[webdataset]'") from error
    shard_images = whole(1)("shard_images", shard_images)
    starts = range(0, len(images), shard_images)
    records = {f"images-{number:06d}.tar": min(shard_images, len(images) - start) for number, start in enumerate(starts)}

    def write_shard(path: Path, number: int) -> None:
        start = starts[number]
        with webdataset.TarWriter(str(path)) as tar:
            for i in range(start, min(start + shard_images, len(images))):
                tar.write(
                    {
                        "__key__": f"{i:09d}",
                        "patches.npy": images.patches[i].cpu().numpy().astype(np.float32),
                        "index.npy": images.index[i].cpu().numpy(),
                        "cls": int(images.labels[i]),
                        "json": {
                            "trajectory": int(images.trajectory[i]),
                            "stage": int(images.stage[i]),
                            "grid": images.grid,
                            "mean": images.mean,
                            "std": images.std,
                        },
                    }
                )

    return _export(output_folder(folder, force), "shards", SHARD, records, {"grid": images.grid}, write_shard)


def export_parquet(
    images: SparseImages, folder: str | Path, *, shard_images: int = SHARD_IMAGES, fill: float = 0.5, force: bool = False
) -> list[Path]:
    """Parquet shards of at most shard_images rows, which `datasets.load_dataset("parquet", data_dir=folder)` reads as its split "train": image (8-bit
    PNG, dropped patches grey), label, trajectory, stage and retained_patches (cells of the grid).

    index.json names the shards and how many images each holds. Raises InputError where the folder is not empty or the pyarrow package is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("exporting Parquet shards needs the pyarrow package: pip install 'sparse-model-inversion[parquet]'") from error
    shard_images = whole(1)("shard_images", shard_images)
    starts = range(0, len(images), shard_images)
    names = [f"train-{number:05d}-of-{len(starts):05d}.parquet" for number in range(len(starts))]
    records = {name: min(shard_images, len(images) - start) for name, start in zip(names, starts, strict=True)}
    numbers = pyarrow.int64()
    kinds = {"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}), "retained_patches": pyarrow.list_(numbers)}
    schema = pyarrow.schema([(name, kinds.get(name, numbers)) for name in FEATURES])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})

    def write_shard(path: Path, number: int) -> None:
        some = images[starts[number] : starts[number] + shard_images]
        columns = {name: getattr(some, held).tolist() for name, held in (("label", "labels"), ("trajectory", "trajectory"), ("stage", "stage"))}
        pictures = [{"bytes": _png(pixels), "path": None} for pixels in some.to_pixels(fill)]
        rows = {"image": pictures, **columns, "retained_patches": some.index.tolist()}
        parquet.write_table(pyarrow.table(rows, schema=schema), path)

    return _export(output_folder(folder, force), "shards", TABLE, records, {"grid": images.grid}, write_shard)


def _png(pixels: Tensor) -> bytes:
    held = io.BytesIO()
    to_picture(pixels).save(held, format="PNG")
    return held.getvalue()


def _export(folder: Path, kind: str, form: re.Pattern, records: dict, about: dict, write: Callable[[Path, int], None]) -> list[Path]:
    """Write the files that `records` names, and the index that keeps the records under `kind`; of an earlier export remove what its index names.

    Raises InputError where a file of such a name, or an index, is of no export of ours: it would be replaced, or read as one of these images.
    """
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {kind: {}}
    earlier = index.get(kind) if isinstance(index, dict) else None
    if not isinstance(earlier, dict):
        raise InputError(f"{folder / INDEX} is not of an export of this kind: choose another folder")
    there = {path.name for path in folder.iterdir() if form.fullmatch(path.name)}
    foreign = sorted(there - earlier.keys())
    if foreign:
        raise InputError(f"{folder / foreign[0]} is named by no {INDEX} of an export of ours: remove it, or choose another folder")

    def name_files(named: dict) -> None:
        _write(folder / INDEX, lambda temporary: temporary.write_text(json.dumps({**about, kind: named})))

    name_files({**earlier, **records})  # first: after a kill the next export knows all of them
    for number, name in enumerate(records):
        _write(folder / name, lambda temporary, number=number: write(temporary, number))
    for name in there - records.keys():
        (folder / name).unlink()
    name_files(records)
    return [folder / name for name in records]


def _write(path: Path, write: Callable[..., object]) -> None:
    try:
        replace_file(path, write)
    except OSError as error:
        raise RunError(f"writing {path} failed ({error.strerror or error})") from error
