"""The result of an inversion: sparse images, each the pixels of its retained patches and where they lie."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from . import storage
from .patches import from_patches
from .storage import TENSORS


@dataclass(frozen=True, eq=False)
class SparseImages:
    """M sparse images of n retained patches each.

    Indexing with an int, a slice, a list or a boolean or integer tensor gives SparseImages again (an int: one image, M = 1).
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
        if self.patches.ndim != 5 or self.patches.shape[3] != self.patches.shape[4]:
            raise InputError(f"patches must be [M, n, C, p, p], got {list(self.patches.shape)}")
        m, n = self.patches.shape[:2]
        for name, shape in (("index", (m, n)), ("labels", (m,)), ("trajectory", (m,)), ("stage", (m,))):
            if tuple(getattr(self, name).shape) != shape:
                raise InputError(f"{name} must be {list(shape)} for patches {list(self.patches.shape)}, got {list(getattr(self, name).shape)}")
        if self.index.dtype.is_floating_point or self.labels.dtype.is_floating_point:
            raise InputError("index and labels must be whole numbers")
        if len(self.mean) != self.patches.shape[2] or len(self.std) != self.patches.shape[2]:
            raise InputError(f"mean and std must have one value for each of {self.patches.shape[2]} channels")
        if self.index.numel() and not 0 <= int(self.index.min()) <= int(self.index.max()) < self.grid[0] * self.grid[1]:
            raise InputError(f"index must name cells of the {self.grid[0]}x{self.grid[1]} grid, 0 to {self.grid[0] * self.grid[1] - 1}")

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

    def __getitem__(self, which: int | slice | Sequence[int] | Tensor) -> "SparseImages":
        if hasattr(which, "__index__") and not isinstance(which, Tensor):
            which = which.__index__()
            if not -len(self) <= which < len(self):
                raise IndexError(f"image {which} of {len(self)}")
            which = [which]
        return replace(self, **{name: getattr(self, name)[which] for name in TENSORS})

    def __repr__(self) -> str:
        (rows, columns), p = self.grid, self.patch_size
        return f"SparseImages({len(self)} images, {self.index.shape[1]} of {rows * columns} patches of {p}x{p} px)"

    def to(self, device: torch.device | str) -> "SparseImages":
        """The same images with their tensors on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    def to_dense(self, fill: float | Sequence[float] | None = None) -> Tensor:
        """[M, C, H, W] in normalised pixels; cells without a patch get `fill` (a value, or one per channel; None: the training mean, 0)."""
        channels = self.patches.shape[2]
        values = [0.0 if fill is None else fill] * channels if fill is None or isinstance(fill, int | float) else list(fill)
        if len(values) != channels:
            raise InputError(f"fill must be a number or {channels} numbers, got {len(values)}")
        return from_patches(self.patches, self.index, self.grid, torch.tensor(values))

    def to_pixels(self, fill: float = 0.5) -> Tensor:
        """[M, C, H, W] as fractions of white, in [0, 1], to look at; cells without a patch get `fill`."""
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
        fields = storage.load(Path(folder))
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
