"""Patch embedding of the active patches of a rolled and flipped image: the definition.

The augmented image is  a[c, y, x] = image[c, (y - dy) mod H, (x' - dx) mod W],  x' = W - 1 - x if flipped, else x:
`torch.roll(image, (dy, dx), (1, 2))` and then a horizontal flip. An active patch moves with its pixels to the grid cell
nearest to where they went, and the token made there is

    token = weight . pixels of a under the cell + bias + position[cell]

so it may read up to half a patch of its neighbours' pixels. The map from patches to cells is a bijection of the grid:
every pixel is read at most once, so the gradient of the image is a plain scatter.
"""

import torch
from torch import Tensor

from ..precision import wide


def moved_cells(index: Tensor, grid: tuple[int, int], patch_size: int, augmentation: Tensor) -> Tensor:
    """Grid cells to which patches move under a roll and a flip.

    index: int [..., n], row-major cells of the still image; grid: (rows, columns); augmentation: int [3], (dy, dx, flip),
    offsets in pixels. Offsets are divided by the patch size and rounded to nearest, a half up. Returns int like `index`.
    """
    rows, columns = grid
    dy, dx, flip = augmentation.unbind()
    down, right = ((2 * offset + patch_size) // (2 * patch_size) for offset in (dy, dx))  # floor(offset / p + 1/2)
    row = (index // columns + down) % rows
    column = (index % columns + right) % columns
    column = torch.where(flip.bool(), columns - 1 - column, column)
    return (row * columns + column).to(index.dtype)


def source_pixels(cells: Tensor, grid: tuple[int, int], patch_size: int, augmentation: Tensor) -> Tensor:
    """Flat positions y * W + x in the still image of the pixels that lie under `cells` [B, n] of the augmented one: int [B, n, p, p]."""
    rows, columns = grid
    height, width = rows * patch_size, columns * patch_size
    dy, dx, flip = augmentation.unbind()
    within = torch.arange(patch_size, device=cells.device)
    y = (cells // columns)[..., None] * patch_size + within  # [B, n, p]
    x = (cells % columns)[..., None] * patch_size + within
    x = torch.where(flip.bool(), width - 1 - x, x)
    return ((y - dy) % height)[..., :, None] * width + ((x - dx) % width)[..., None, :]


def patch_embed(
    images: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    augmentation: Tensor | None = None,
    patch_size: int = 16,
) -> Tensor:
    """Tokens of the active patches, prefix tokens first.

    images: [B, C, H, W], H and W multiples of patch_size; index: int [B, n], row-major cells of the active patches in the
    still image, distinct within a row; weight: [d, C * p * p]; bias: [d]; position: [N, d], N = (H / p) * (W / p); prefix: [P, d], tokens that
    every image gets, their position embedding already added; augmentation: int [3], (dy, dx, flip), offsets in pixels.
    Returns [B, P + n, d] in weight's dtype; images may be float32 where the weight is narrower. Differentiable in images.
    """
    batch, channels, height, width = images.shape
    n = index.shape[1]
    grid = (height // patch_size, width // patch_size)
    if augmentation is None:
        augmentation = torch.zeros(3, dtype=torch.int32, device=images.device)
    cells = moved_cells(index, grid, patch_size, augmentation)
    source = source_pixels(cells, grid, patch_size, augmentation).long()
    pixels = wide(images).flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, channels, -1))  # [B, C, n*p*p]
    pixels = pixels.unflatten(2, (n, patch_size**2)).transpose(1, 2).flatten(2)  # [B, n, C*p*p]
    tokens = pixels @ wide(weight).T
    if bias is not None:
        tokens = tokens + wide(bias)
    if position is not None:
        tokens = tokens + wide(position)[cells.long()]
    if prefix is not None:
        tokens = torch.cat([wide(prefix).expand(batch, -1, -1), tokens], dim=1)
    return tokens.to(weight.dtype)
