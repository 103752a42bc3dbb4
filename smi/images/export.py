"""Sparse images for others: PNG files to look at, WebDataset shards to train from."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import InputError, RunError
from ..files import output_folder, replace_file
from .sparse_images import SparseImages

SHARD_IMAGES = 1000


def to_picture(pixels: Tensor) -> Image.Image:
    """[C, H, W] in [0, 1], one channel or at least three, as an 8-bit picture."""
    array = (pixels[:3] if len(pixels) >= 3 else pixels[:1]).mul(255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def export_png(images: SparseImages, folder: str | Path, *, fill: float = 0.5, force: bool = False) -> list[Path]:
    """One PNG per image, dropped patches grey, with its label, trajectory and stage in the name, and index.json with what a picture cannot keep.

    8-bit pictures are for looking at; to compute with the images keep the folder that `save` writes. Raises InputError where the folder is not empty.
    """
    folder = output_folder(folder, force)
    paths = []
    for i, pixels in enumerate(images.to_pixels(fill)):
        label, trajectory, stage = (int(values[i]) for values in (images.labels, images.trajectory, images.stage))
        path = folder / f"{i:06d}_label{label}_trajectory{trajectory}_stage{stage}.png"
        _write(path, lambda temporary, pixels=pixels: to_picture(pixels).save(temporary, format="PNG"))
        paths.append(path)
    _remove_others(folder, "*_label*_trajectory*_stage*.png", paths)
    records = {path.name: index for path, index in zip(paths, images.index.tolist(), strict=True)}
    _write(folder / "index.json", lambda temporary: temporary.write_text(json.dumps({"grid": images.grid, "retained_patches": records})))
    return paths


def export_webdataset(images: SparseImages, folder: str | Path, *, shard_images: int = SHARD_IMAGES, force: bool = False) -> list[Path]:
    """Tar shards of at most shard_images samples: patches.npy (float32 [n, C, p, p]), index.npy (int64 [n]), cls (the label) and json (trajectory,
    stage, grid).

    Raises InputError where the folder is not empty or the webdataset package is missing.
    """
    try:
        import webdataset
    except ImportError as error:
        raise InputError("exporting WebDataset shards needs the webdataset package: pip install 'sparse-model-inversion[webdataset]'") from error
    if shard_images < 1:
        raise InputError(f"a shard must hold at least 1 image, got {shard_images}")
    folder = output_folder(folder, force)

    def write_shard(path: Path, start: int) -> None:
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

    paths = []
    for number, start in enumerate(range(0, len(images), shard_images)):
        path = folder / f"images-{number:06d}.tar"
        _write(path, lambda temporary, start=start: write_shard(temporary, start))
        paths.append(path)
    _remove_others(folder, "images-*.tar", paths)
    return paths


def _remove_others(folder: Path, pattern: str, kept: list[Path]) -> None:
    """Files of an earlier export that this one did not replace."""
    for path in set(folder.glob(pattern)) - set(kept):
        path.unlink()


def _write(path: Path, write: Callable[..., object]) -> None:
    try:
        replace_file(path, write)
    except OSError as error:
        raise RunError(f"writing {path} failed ({error.strerror or error})") from error
