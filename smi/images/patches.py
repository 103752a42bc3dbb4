"""Images cut into patches and put together again; grid cells are row-major."""

import torch
from torch import Tensor


def to_patches(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, C, H, W] to all their patches [B, N, C, p, p]."""
    cells = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # [B, C, rows, columns, p, p]
    return cells.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).contiguous()


def from_patches(patches: Tensor, index: Tensor, grid: tuple[int, int], fill: Tensor) -> Tensor:
    """Patches [B, n, C, p, p] at cells index [B, n], every other cell filled with fill [C]: [B, C, H, W]."""
    batch, _, channels, p, _ = patches.shape
    rows, columns = grid
    cells = fill.to(patches).view(1, 1, channels, 1, 1).expand(batch, rows * columns, channels, p, p).clone()
    cells[torch.arange(batch, device=patches.device)[:, None], index.long()] = patches
    return cells.view(batch, rows, columns, channels, p, p).permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * p, columns * p)
