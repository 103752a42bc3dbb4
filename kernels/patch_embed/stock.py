"""patch_embed from PyTorch's own operations: gather by the reference's pixel map, one GEMM; any device, float64 too."""

import torch
from torch import Tensor

from . import reference


def pixel_map(index: Tensor, augmentation: Tensor | None, patch_size: int, channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cells int64 [B, n] of the active patches and flat positions int64 [B, n, C * p * p] in an image [C, H, W] of their pixels."""
    grid = (height // patch_size, width // patch_size)
    if augmentation is None:
        augmentation = index.new_zeros(3)
    cells = reference.moved_cells(index.long(), grid, patch_size, augmentation)
    plane = torch.arange(channels, device=index.device)[:, None, None] * (height * width)
    return cells, (reference.source_pixels(cells, grid, patch_size, augmentation)[:, :, None] + plane).flatten(2)


def forward(
    images: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    augmentation: Tensor | None,
    patch_size: int,
) -> Tensor:
    """Tokens [B, P + n, d] as in op.py."""
    batch = images.shape[0]
    cells, source = pixel_map(index, augmentation, patch_size, *images.shape[1:])
    pixels = images.flatten(1).gather(1, source.flatten(1)).view(source.shape).to(weight.dtype)
    tokens = torch.nn.functional.linear(pixels, weight, bias)
    if position is not None:
        tokens += position[cells]
    return tokens if prefix is None else torch.cat([prefix.expand(batch, -1, -1), tokens], dim=1)


def backward(
    grad_tokens: Tensor,
    index: Tensor,
    weight: Tensor,
    augmentation: Tensor | None,
    patch_size: int,
    prefix: int,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient [B, C, H, W] of the images, in dtype."""
    channels = weight.shape[1] // patch_size**2
    _, source = pixel_map(index, augmentation, patch_size, channels, height, width)
    pixels = (grad_tokens[:, prefix:] @ weight).to(dtype)  # [B, n, C * p * p]
    images = pixels.new_zeros(grad_tokens.shape[0], channels, height, width)
    images.flatten(1).scatter_(1, source.flatten(1), pixels.flatten(1))
    return images
