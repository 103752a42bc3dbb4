"""Pictures of sparse images: grids of them, what each stage took, and how one came to be."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..images.patches import from_patches, to_patches
from ..images.sparse_images import SparseImages
from ..inversion.snapshots import Progress
from .plots import save

DROPPED = 0.86  # light grey of patches that an image does not have; rarely a colour of an inverted image
CELL = 1.15  # inches per image
DOTS = 126, 224  # along an image at least, and at most where it has so many pixels
GAP = 0.05  # between images, of their width
SIDE_BY_SIDE = 4  # snapshots, so that a phone shows them large enough
LINES = 10  # rows of images shown of a result without stages


def to_rgb(images: SparseImages) -> Tensor:
    """[M, H, W, 3] in [0, 1], dropped patches light grey."""
    pixels = images.to_pixels()
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    present = torch.ones(*images.index.shape, 1, images.patch_size, images.patch_size)
    present = from_patches(present, images.index.cpu(), images.grid, torch.zeros(1))
    return torch.where(present > 0, pixels, DROPPED).permute(0, 2, 3, 1)


def whole_trajectories(images: SparseImages) -> Tensor:
    """Numbers of the trajectories of which every stage is there, ascending."""
    numbers, counts = images.trajectory.unique(return_counts=True)
    return numbers[counts == int(images.stage.max()) + 1]


def rows_of(images: SparseImages, columns: int = 10, lines: int = LINES) -> list[tuple[str, SparseImages]]:
    """Titled rows of at most `columns` images: PRI's stages one below the other with a trajectory in each column, other images simply in order, the
    first `lines` rows of them. Only trajectories of which every stage is there are shown by stages."""
    if not len(images):
        raise InputError("there are no images to show")
    stages = int(images.stage.max()) + 1
    whole = whole_trajectories(images)[:columns]
    if stages == 1 or not len(whole):
        return [
            (f"{start}-{min(start + columns, len(images)) - 1}", images[start : start + columns])
            for start in range(0, min(len(images), lines * columns), columns)
        ]
    return [(f"stage {stage + 1}", images[(images.stage == stage) & torch.isin(images.trajectory, whole)]) for stage in range(stages)]


def together(images: SparseImages, columns: int = 10) -> SparseImages:
    """One image per trajectory, at most `columns`, of the patches of all its stages."""
    chosen = images[torch.isin(images.trajectory, whole_trajectories(images)[:columns])]
    stages = int(images.stage.max()) + 1
    chosen = chosen[torch.argsort(chosen.trajectory * stages + chosen.stage)]
    patches, index = (tensor.unflatten(0, (-1, stages)).flatten(1, 2) for tensor in (chosen.patches, chosen.index))
    first = chosen[::stages]
    return replace(first, patches=patches, index=index)


def variety(images: SparseImages, count: int) -> SparseImages:
    """At most `count` images: the first ones; of a result in stages one of each trajectory in turn, each of another stage."""
    stages = int(images.stage.max()) + 1
    turn = (images.stage - images.trajectory) % stages
    order = torch.argsort(turn * (int(images.trajectory.max()) + 1) + images.trajectory)
    return images[order[:count]] if stages > 1 else images[:count]


def picture_grid(rows: Sequence[tuple[str, SparseImages]], path: str | Path, *, title: str | None = None) -> Path:
    """A PNG with one row of images per (title, images); labels above the images of the first row and wherever they change. Returns the path."""
    lines: list[tuple[str, Tensor, list[str]]] = []
    above: list[str] = []
    for name, images in rows:
        labels = [str(label) for label in images.labels.tolist()]
        lines.append((name, to_rgb(images), labels if labels != above else []))
        above = labels
    return mosaic(lines, path, title=title)


def progress_picture(progress: Progress, images: SparseImages, path: str | Path) -> Path:
    """A PNG of the snapshots of one trajectory, four side by side: all pixels, and where patches left before the end, those that were active below.
    images: of its run."""
    cells = to_patches(progress.pixels, images.patch_size)
    frames = [_one(images, cells[place], torch.arange(cells.shape[1])) for place in range(len(cells))]
    active = [_one(images, cells[place, index], index) for place, index in enumerate(progress.active)]
    captions = [f"iteration {iteration + 1}" for iteration in progress.iterations]
    counts = [f"{len(index)} patches" for index in progress.active]
    left = any(len(index) < cells.shape[1] for index in progress.active)
    lines = []
    for start in range(0, len(cells), SIDE_BY_SIDE):
        some = slice(start, start + SIDE_BY_SIDE)
        lines.append(("all pixels", torch.cat(list(map(to_rgb, frames[some]))), captions[some]))
        if left:
            lines.append(("active", torch.cat(list(map(to_rgb, active[some]))), counts[some]))
    return mosaic(lines, path)


def _one(images: SparseImages, patches: Tensor, index: Tensor) -> SparseImages:
    """A single image of these patches [n, C, p, p] on the grid of others."""
    number = torch.zeros(1, dtype=torch.int64)
    return SparseImages(patches[None], index[None], number, number, number, images.grid, images.mean, images.std)


def mosaic(rows: Sequence[tuple[str, Tensor, Sequence[str]]], path: str | Path, *, title: str | None = None) -> Path:
    """A PNG with one row per (title, images [M, H, W, 3] in [0, 1] of one size, what is written above each of them or nothing)."""
    from matplotlib.figure import Figure

    columns = max(len(images) for _, images, _ in rows)
    height, width = rows[0][1].shape[1:3]
    font = min(12.0, max(9.0, 1.2 * columns))  # points: a wide picture is shown smaller
    tall, room = CELL * height / width, 0.021 * font  # inches: of an image, of the words above it
    margin = 0.2 + 0.0085 * font * max(len(name) for name, *_ in rows)
    heading = 0.028 * font * bool(title)
    size = margin + columns * CELL * (1 + GAP), heading + sum(tall + (room if above else GAP * CELL) for *_, above in rows) + 0.05
    figure = Figure(figsize=size, dpi=min(DOTS[1], max(DOTS[0], width)) / CELL)
    page = figure.add_axes((0, 0, 1, 1))  # in inches from the upper left
    y = heading
    for name, images, above in rows:
        y += room if above else GAP * CELL
        page.text(margin - 0.1, y + tall / 2, name, ha="right", va="center", fontsize=font)
        for column, pixels in enumerate(images):
            x = margin + column * CELL * (1 + GAP)
            page.imshow(pixels.numpy(), interpolation="antialiased", extent=(x, x + CELL, y + tall, y))
            if column < len(above):
                page.text(x + CELL / 2, y - 0.03, above[column], ha="center", va="bottom", fontsize=font - 1)
        y += tall
    if title:
        page.text(size[0] / 2, 0.06, title, ha="center", va="top", fontsize=font + 1)
    page.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="auto")
    page.axis("off")
    return save(figure, path)
