"""Augmentation of sparse images: rolled by pixels and flipped, the index map following, and fewer patches.

A roll by (dy, dx) moves a patch to the cell nearest to where it went (a half rounds up) and shifts its pixels by what remains, at most half a patch.
Pixels that come from a cell without a patch repeat the border of the patch itself. Where nothing is missing this is the roll of the whole image.
"""

import torch
from torch import Tensor


def roll_and_flip(patches: Tensor, index: Tensor, grid: tuple[int, int], offsets: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
    """Each image rolled by its offsets, then mirrored left to right where its flip is set.

    patches [B, n, C, p, p], index int64 [B, n], grid (rows, columns), offsets int64 [B, 2] (down, right) in pixels, flips bool [B].
    Returns patches and index of the same shapes; the order of the patches is kept.
    """
    (rows, columns), p = grid, patches.shape[-1]
    cells = torch.div(2 * offsets + p, 2 * p, rounding_mode="floor")  # [B, 2]
    remainder = offsets - cells * p
    if bool(remainder.any()):
        patches = _shift(patches, index, grid, remainder)
    row = (index // columns + cells[:, :1]) % rows
    column = (index % columns + cells[:, 1:]) % columns
    column = torch.where(flips[:, None], columns - 1 - column, column)
    patches = torch.where(flips.view(-1, 1, 1, 1, 1), patches.flip(-1), patches)
    return patches, row * columns + column


def _shift(patches: Tensor, index: Tensor, grid: tuple[int, int], remainder: Tensor) -> Tensor:
    """Pixels shifted by remainder [B, 2], at most half a patch: from the neighbour where it is there, else from the patch's own border."""
    batch, n, channels, p, _ = patches.shape
    (rows, columns), device = grid, patches.device
    along = torch.arange(p, device=device)
    y, x = (along - remainder[:, i, None] for i in (0, 1))  # [B, p], where pixel i comes from, within the patch
    place = torch.full((batch, rows * columns), -1, dtype=torch.int64, device=device)
    place.scatter_(1, index, torch.arange(n, device=device).expand(batch, -1))
    source_row = (index // columns)[:, :, None] + torch.div(y, p, rounding_mode="floor")[:, None]  # [B, n, p]
    source_column = (index % columns)[:, :, None] + torch.div(x, p, rounding_mode="floor")[:, None]
    cell = (source_row % rows)[..., :, None] * columns + (source_column % columns)[..., None, :]  # [B, n, p, p]
    source = place.gather(1, cell.flatten(1)).view(cell.shape)
    there = source >= 0
    source = torch.where(there, source, torch.arange(n, device=device).view(1, -1, 1, 1))
    inside = torch.where(there, (y % p)[:, None, :, None], y.clamp(0, p - 1)[:, None, :, None])
    across = torch.where(there, (x % p)[:, None, None, :], x.clamp(0, p - 1)[:, None, None, :])
    flat = (source * p + inside) * p + across  # into the pixels of one channel, patch by patch
    pixels = patches.transpose(1, 2).reshape(batch, channels, -1)
    return pixels.gather(2, flat.view(batch, 1, -1).expand(-1, channels, -1)).view(batch, channels, n, p, p).transpose(1, 2)


def draw(batch: int, roll: int, flip: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Offsets int64 [batch, 2], uniform in [-roll, roll] pixels, and flips bool [batch] with probability 1/2 where `flip`."""
    offsets = torch.randint(-roll, roll + 1, (batch, 2), generator=generator)
    flips = torch.randint(0, 2, (batch,), generator=generator).bool() & flip
    return offsets, flips


def drop_patches(patches: Tensor, index: Tensor, most: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random part of the patches [B, n, ...] at cells index [B, n] of each image (PatchDropout, Liu et al. 2023).

    How many is drawn for the batch, from (1 - most) n, at least one, to n.
    """
    n = index.shape[1]
    kept = int(torch.randint(max(1, round((1 - most) * n)), n + 1, (), generator=generator))
    chosen = torch.rand(index.shape, generator=generator).argsort(1)[:, :kept]
    return patches[torch.arange(len(patches))[:, None], chosen], index.gather(1, chosen)
