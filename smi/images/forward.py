"""Sparse images through a model: the retained patches only, each with its own position embedding."""

from typing import Any

import torch
from torch import Tensor, nn

from ..engine import forward_patches
from ..errors import InputError
from ..kernels.attention import attention
from ..models.vit import describe_weights
from ..plain import dense, whole
from ..surroundings import neutral
from .sparse_images import SparseImages


def forward_sparse(model: nn.Module, images: SparseImages | tuple[Tensor, Tensor], batch_size: int = 128) -> Tensor:
    """Logits [M, classes] of a timm ViT on sparse images: CLS and the retained tokens, nothing else.

    images: SparseImages, or (patches [M, n, C, p, p], index [M, n]) as its dataset gives them. batch_size: images at a time. Where gradients are
    enabled the logits are differentiable in the model's weights and in the patches. Dropout and stochastic depth are off. Raises InputError where the
    patches do not fit the model. A model that normalises its pixels itself reads patches that are normalised as it does.
    """
    batch_size = whole(1)("batch_size", batch_size)
    with neutral(grad=None):
        return _forward_sparse(model, images, batch_size)


def _pair(images: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(images, tuple | list) or len(images) != 2:
        raise InputError(f"images must be SparseImages, or (patches [M, n, C, p, p], index [M, n]), got {type(images).__name__}")
    return dense("patches", images[0]), dense("index", images[1])


def _forward_sparse(model: nn.Module, images: SparseImages | tuple[Tensor, Tensor], batch_size: int) -> Tensor:
    patches, index = (images.patches, images.index) if isinstance(images, SparseImages) else _pair(images)
    vit = describe_weights(model, frozen=not torch.is_grad_enabled())
    wanted = (vit.channels, vit.patch_size, vit.patch_size)
    if tuple(patches.shape[2:]) != wanted:
        raise InputError(f"{vit.name} takes patches {list(wanted)}, these are {list(patches.shape[2:])}")
    if isinstance(images, SparseImages) and images.grid != vit.grid:
        raise InputError(f"{vit.name} has a {vit.grid[0]}x{vit.grid[1]} grid of patches, these images are on {images.grid[0]}x{images.grid[1]}")
    if not len(patches):
        return torch.empty(0, vit.num_classes, device=vit.device)
    dtype = vit.embed.weight.dtype
    if isinstance(images, SparseImages) and vit.normalises and (vit.mean, vit.std) != (images.mean, images.std):
        mine, own = ([torch.tensor(v, dtype=patches.dtype).view(-1, 1, 1) for v in (x.mean, x.std)] for x in (images, vit))
        patches = (patches * mine[1].to(patches) + mine[0].to(patches) - own[0].to(patches)) / own[1].to(patches)
    return torch.cat(
        [
            forward_patches(vit, some.to(vit.device, dtype), cells.to(vit.device), attention)
            for some, cells in zip(patches.split(batch_size), index.split(batch_size), strict=True)
        ]
    )
