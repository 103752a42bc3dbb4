"""The result of an inversion: sparse images, each the pixels of its retained patches and where they lie."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..plain import LARGEST_SIDE, MEANS, STDS, dense, path, real, scalar, several, whole
from . import storage
from .patches import from_patches
from .storage import TENSORS

WHOLE = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
MOST_TRAJECTORIES = 1 << 31


@dataclass(frozen=True, eq=False)
class SparseImages:
    """M sparse images of n retained patches each.

    Indexing gives SparseImages again: by an int (one image, M = 1), a slice, or a list, array or tensor of whole numbers or truth values.
    """

    patches: Tensor  # [M, n, C, p, p], normalised pixels in the range of valid images
    index: Tensor  # int64 [M, n], row-major grid cell of each patch, ascending; prefix tokens not counted
    labels: Tensor  # int64 [M]
    trajectory: Tensor  # int64 [M], which optimisation an image came from
    stage: Tensor  # int64 [M], its place among the images of its trajectory, 0 emitted first
    grid: tuple[int, int]  # rows, columns
    mean: tuple[float, ...]  # normalisation of the pixels, per channel
    std: tuple[float, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("patches", "index", "labels", "trajectory", "stage"):
            dense(name, getattr(self, name))
        if self.patches.ndim != 5 or self.patches.shape[3] != self.patches.shape[4]:
            raise InputError(f"patches must be [M, n, C, p, p], got {list(self.patches.shape)}")
        m, n = self.patches.shape[:2]
        for name, shape in (("index", (m, n)), ("labels", (m,)), ("trajectory", (m,)), ("stage", (m,))):
            if tuple(getattr(self, name).shape) != shape:
                raise InputError(f"{name} must be {list(shape)} for patches {list(self.patches.shape)}, got {list(getattr(self, name).shape)}")
        for name in ("index", "labels", "trajectory", "stage"):
            held = getattr(self, name)
            if held.dtype not in WHOLE or (name != "index" and held.numel() and int(held.min()) < 0):
                raise InputError(f"{name} must hold whole numbers of at least 0, got {str(held.dtype).removeprefix('torch.')}{_least(held)}")
        channels = self.patches.shape[2]
        plain = {
            "grid": several(whole(1), 2)("grid", self.grid),
            "mean": MEANS("mean", self.mean),
            "std": STDS("std", self.std),
        }
        for name, values in plain.items():
            object.__setattr__(self, name, values)
        if len(self.mean) != channels or len(self.std) != channels:
            raise InputError(f"mean and std must have one value for each of {channels} channels")
        if self.index.numel() and not 0 <= int(self.index.min()) <= int(self.index.max()) < self.grid[0] * self.grid[1]:
            raise InputError(f"index must name cells of the {self.grid[0]}x{self.grid[1]} grid, 0 to {self.grid[0] * self.grid[1] - 1}")
        if max(self.image_size) > LARGEST_SIDE:
            raise InputError(f"an image has at most {LARGEST_SIDE} pixels along a side, a {self.grid[0]}x{self.grid[1]} grid gives {self.image_size}")
        stages = self.grid[0] * self.grid[1] // max(1, n)
        if m and (int(self.stage.max()) >= stages or int(self.trajectory.max()) >= MOST_TRAJECTORIES):
            raise InputError(
                f"stage must be below {stages}, since every stage takes {n} patches of the grid, and trajectory below 2^31: "
                f"got {int(self.stage.max())} and {int(self.trajectory.max())}"
            )

    @property
    def patch_size(self) -> int:
        """Pixels along the side of a patch."""
        return self.patches.shape[-1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels: height, width."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def sparsity(self) -> float:
        """Fraction of the patches that an image lacks."""
        return 1 - self.index.shape[1] / (self.grid[0] * self.grid[1])

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, which: Any) -> "SparseImages":
        rows = rows_of_index(which, len(self))
        return replace(self, **{name: getattr(self, name)[rows if isinstance(rows, slice) else rows.to(self.patches.device)] for name in TENSORS})

    def __repr__(self) -> str:
        (rows, columns), p = self.grid, self.patch_size
        return f"SparseImages({len(self)} images, {self.index.shape[1]} of {rows * columns} patches of {p}x{p} px)"

    def to(self, device: torch.device | str) -> "SparseImages":
        """The same images with their tensors on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    def to_dense(self, fill: float | Sequence[float] | None = None) -> Tensor:
        """[M, C, H, W] in normalised pixels; cells without a patch get `fill` (a value, or one per channel; None: the training mean, 0)."""
        channels = self.patches.shape[2]
        fill = scalar(0.0 if fill is None else fill)
        values = [real()("fill", each) for each in (list(fill) if isinstance(fill, Sequence | np.ndarray | Tensor) else [fill] * channels)]
        if len(values) != channels:
            raise InputError(f"fill must be a number or {channels} numbers, got {len(values)}")
        return from_patches(self.patches, self.index, self.grid, torch.tensor(values))

    def to_pixels(self, fill: float = 0.5) -> Tensor:
        """[M, C, H, W] as fractions of white, in [0, 1], to look at; cells without a patch get `fill`."""
        fill = real()("fill", fill)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        normalised_fill = [(fill - m) / s for m, s in zip(self.mean, self.std, strict=True)]
        return (self.to_dense(normalised_fill).cpu().float() * std + mean).clamp(0, 1)

    def dataset(self) -> "SparseDataset":
        """A torch Dataset of (patches [n, C, p, p], index [n], label)."""
        return SparseDataset(self)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write to a folder (safetensors and JSON); raises InputError if it is not empty and not `force`, or not writable."""
        writer = storage.Writer(folder, force=force)
        self.add_to(writer)
        writer.close(complete=self.provenance.get("complete", True))
        return writer.folder

    def add_to(self, writer: storage.Writer) -> None:
        """Write as one finished batch of a result; when this returns it is on disk. Raises RunError where writing fails."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        writer.add(tensors, {"grid": self.grid, "mean": self.mean, "std": self.std}, self.provenance)

    @staticmethod
    def load(folder: str | Path) -> "SparseImages":
        """Read what `save`, or a run that was interrupted, wrote; raises InputError where there is nothing of the kind."""
        fields = storage.load(path("folder", folder))
        try:
            return SparseImages(**fields)
        except InputError as error:  # tensors that do not fit one another
            raise storage.damaged(Path(folder), error) from error

    @staticmethod
    def cat(parts: Sequence["SparseImages"]) -> "SparseImages":
        """The images of several results one after another; trajectories are renumbered where the parts are of different runs."""
        if not parts:
            raise InputError("there are no images to concatenate")
        first = parts[0]
        for part in parts[1:]:
            for name, mine, other in (
                ("grid", first.grid, part.grid),
                ("patch shape", first.patches.shape[1:], part.patches.shape[1:]),
                ("normalisation", (first.mean, first.std), (part.mean, part.std)),
            ):
                if mine != other:
                    raise InputError(f"images of different {name} cannot be concatenated: {_plain(mine)} and {_plain(other)}")
        same_run = all(part.provenance == first.provenance for part in parts)
        tensors: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in TENSORS}
        if not same_run:
            starts = accumulate((_span(part) for part in parts[:-1]), initial=0)
            tensors["trajectory"] = torch.cat([part.trajectory + start for part, start in zip(parts, starts, strict=True)])
        return replace(first, **tensors, provenance=first.provenance if same_run else {"concatenated": [part.provenance for part in parts]})

    def __add__(self, other: "SparseImages") -> "SparseImages":
        return SparseImages.cat([self, other])


def _span(images: SparseImages) -> int:
    """One more than the largest trajectory number."""
    return int(images.trajectory.max()) + 1 if len(images) else 0


def rows_of_index(which: Any, count: int) -> slice | Tensor:
    """What an index into `count` rows selects, as a slice or as int64 [rows]; raises IndexError for what is none or lies outside."""
    if which is Ellipsis or (isinstance(which, tuple) and not which):
        return slice(None)
    if isinstance(which, slice):
        start, stop, step = which.indices(count)
        return slice(start, stop, step) if step > 0 else torch.arange(count)[list(range(start, stop, step))]
    given = scalar(which)
    if isinstance(given, Mapping | Set | str):
        raise IndexError(f"images are indexed by whole numbers or truth values, not by {type(which).__name__}")
    if not isinstance(given, bool | Tensor | np.ndarray) and hasattr(given, "__index__"):
        given = [given.__index__()]
    try:
        if isinstance(given, Tensor):
            rows = dense("an index", given).detach().cpu()
        else:
            rows = torch.as_tensor(given if isinstance(given, np.ndarray) else np.asarray(list(given)))
    except (TypeError, ValueError, RuntimeError, InputError) as error:
        raise IndexError(f"images are indexed by whole numbers or truth values, not by {type(which).__name__}") from error
    rows = rows.long() if not rows.numel() and rows.dtype != torch.bool else rows
    if rows.ndim != 1 or rows.dtype not in (*WHOLE, torch.bool):
        raise IndexError(f"images are indexed by whole numbers or truth values of one axis, not by {str(rows.dtype)[6:]} {list(rows.shape)}")
    if rows.dtype == torch.bool:
        if len(rows) != count:
            raise IndexError(f"a mask of {len(rows)} truth values does not fit {count} images")
        return rows.nonzero()[:, 0]
    if len(rows) and not -count <= int(rows.min()) <= int(rows.max()) < count:
        raise IndexError(f"image {int(rows.max() if int(rows.max()) >= count else rows.min())} of {count}")
    return rows.long() % count if count else rows.long()


def check_labels(name: str, labels: Tensor, classes: int | None = None) -> None:
    """Raise InputError unless labels [N] are whole numbers from 0 to `classes` - 1."""
    least, most = (int(labels.min()), int(labels.max())) if labels.numel() and labels.dtype in WHOLE else (0, 0)
    if labels.dtype not in WHOLE or least < 0 or (classes is not None and most >= classes):
        upper = "at least 0" if classes is None else f"0 to {classes - 1}"
        raise InputError(f"{name} must be whole numbers of {upper}, got {str(labels.dtype).removeprefix('torch.')} from {least} to {most}")


def _least(values: Tensor) -> str:
    return f" with {int(values.min())}" if values.dtype in WHOLE and values.numel() else ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, torch.Size) else value


class SparseDataset(Dataset):
    """(patches [n, C, p, p], index int64 [n], label int) of each sparse image."""

    def __init__(self, images: SparseImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        return self.images.patches[i], self.images.index[i], int(self.images.labels[i])
