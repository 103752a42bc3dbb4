"""The augmentation of a run: a table int32 [T, 3] of (dy, dx, flip), one row an iteration, drawn before the run starts."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import InputError


def draw(iterations: int, image_size: tuple[int, int], generator: torch.Generator, jitter: int | None = None, flip: bool = True) -> Tensor:
    """Uniform offsets in [-side/8, side/8] (or [-jitter, jitter]) pixels for height and width, and a flip with probability 1/2."""
    limits = [side // 8 if jitter is None else jitter for side in image_size]
    offsets = [torch.randint(-limit, limit + 1, (iterations,), generator=generator) for limit in limits]
    flips = torch.randint(0, 2, (iterations,), generator=generator) * flip
    return torch.stack([*offsets, flips], dim=1).int()


def from_rows(rows: Sequence[tuple[int, int, bool]], iterations: int) -> Tensor:
    """A user's own table, one (dy, dx, flip) an iteration."""
    rows = list(rows)
    if len(rows) != iterations:
        raise InputError(f"augmentation needs one (dy, dx, flip) for each of the {iterations} iterations, got {len(rows)}")
    try:
        table = torch.tensor([list(row) for row in rows])
        fits = table.ndim == 2 and table.shape[1] == 3 and not table.dtype.is_floating_point and int(table.abs().max()) < 2**30
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise InputError("each row of augmentation must be (dy, dx, flip) in whole pixels")
    return table.int()


def hold_still(table: Tensor, iterations: Iterable[int]) -> Tensor:
    """The table with no augmentation at these iterations."""
    table = table.clone()
    table[list(iterations)] = 0
    return table
