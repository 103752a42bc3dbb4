"""Pictures and tables that people look at."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError, RunError
from .patches import from_patches
from .sparse_images import SparseImages
from .storage import replace_file

DROPPED = 0.86  # light grey of patches that an image does not have; rarely a colour of an inverted image
CELL = 1.15  # inches per image


def to_rgb(images: SparseImages) -> Tensor:
    """[M, H, W, 3] in [0, 1], dropped patches light grey."""
    pixels = images.to_pixels()
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    present = torch.ones(*images.index.shape, 1, images.patch_size, images.patch_size)
    present = from_patches(present, images.index.cpu(), images.grid, torch.zeros(1))
    return torch.where(present > 0, pixels, DROPPED).permute(0, 2, 3, 1)


def rows_of(images: SparseImages, columns: int = 10) -> list[tuple[str, SparseImages]]:
    """Titled rows of at most `columns` images: PRI's stages one below the other with a trajectory in each column, other images simply in order, the
    first 10 rows of them. Only trajectories of which every stage is there are shown by stages."""
    if not len(images):
        raise InputError("there are no images to show")
    stages = int(images.stage.max()) + 1
    numbers, counts = images.trajectory.unique(return_counts=True)
    whole = numbers[counts == stages][:columns]
    if stages == 1 or not len(whole):
        return [
            (f"{start}-{min(start + columns, len(images)) - 1}", images[start : start + columns])
            for start in range(0, min(len(images), 10 * columns), columns)
        ]
    return [(f"stage {stage + 1}", images[(images.stage == stage) & torch.isin(images.trajectory, whole)]) for stage in range(stages)]


def picture_grid(rows: Sequence[tuple[str, SparseImages]], path: str | Path, *, title: str | None = None) -> Path:
    """A PNG with one row of images per (title, images); labels above the images of the first row and wherever they change. Returns the path."""
    from matplotlib.figure import Figure

    columns = max(len(images) for _, images in rows)
    height, width = rows[0][1].image_size
    cell = (CELL, CELL * height / width)
    margin = 0.2 + 0.072 * max(len(name) for name, _ in rows)  # inches, for the row titles
    size = (columns * cell[0] + margin, len(rows) * (cell[1] + 0.16) + 0.25 + 0.3 * bool(title))
    figure = Figure(figsize=size, dpi=110)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    top = 1 - (0.22 + 0.3 * bool(title)) / size[1]
    figure.subplots_adjust(left=margin / size[0], right=0.995, bottom=0.01, top=top, wspace=0.05, hspace=0.16)
    above: list[int] = []
    for line, (name, images) in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        labels = images.labels.tolist()
        for axis, pixels, label in zip(line, to_rgb(images), labels, strict=False):
            axis.imshow(pixels.numpy(), interpolation="nearest")
            if labels != above:
                axis.set_title(str(label), fontsize=8, pad=2)
        above = labels
        line[0].text(-0.08, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.06 / size[1], va="top")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
    except OSError as error:
        raise RunError(f"the picture {path} cannot be written ({error.strerror or error})") from error
    return path
