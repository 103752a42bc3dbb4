"""How a model reads sparse images: a ViT on their patch grid the retained patches alone, any other model the filled image."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..engine import Fused
from ..errors import InputError
from ..models.description import ViT
from ..models.proof import normalises
from ..models.unwrap import peel, unwrapped
from ..models.vit import describe_weights
from .forward import forward_sparse
from .patches import from_patches
from .sparse_images import SparseImages


class DenseFillWarning(UserWarning):
    """A model sees missing patches as the training mean, and was trained on no such images."""


@dataclass(frozen=True, eq=False)
class Reader:
    """Called with patches [B, n, C, p, p] at cells index [B, n], normalised as the images are, it gives the model's logits [B, classes]."""

    model: nn.Module
    grid: tuple[int, int]
    sparse: bool  # the model reads the retained patches alone
    scale: Tensor | None  # [C], from the normalisation of the images to that of the model; None where they are the same
    shift: Tensor | None
    num_classes: int
    fused: Callable[[Tensor, Tensor], Tensor] | None = None  # the fused engine's pass, for a model that is not trained

    def __call__(self, patches: Tensor, index: Tensor) -> Tensor:
        if self.sparse:
            patches = self._renormalised(patches, 2)
            if _patch_grid(self.model):
                return self.model((patches, index))
            return self.fused(patches, index) if self.fused else forward_sparse(self.model, (patches, index), batch_size=len(patches))
        dense = from_patches(patches, index, self.grid, torch.zeros(patches.shape[2]))
        return self.model(self._renormalised(dense, 1))

    def _renormalised(self, pixels: Tensor, channel: int) -> Tensor:
        if self.scale is None or self.shift is None:
            return pixels
        shape = [1] * pixels.ndim
        shape[channel] = -1
        return pixels * self.scale.to(pixels).view(shape) + self.shift.to(pixels).view(shape)


def make_reader(model: nn.Module, images: SparseImages, role: str = "the model", frozen: bool = False) -> Reader:
    """The reader of these images by a model. role: its name in errors. frozen: its weights stay as they are now, and it needs no gradients.

    Warns (DenseFillWarning) where missing patches are filled. Raises InputError where the model cannot take the images, with what does not fit.
    """
    if not len(images):
        raise InputError("there are no images")
    model, channels = peel(model), images.patches.shape[2]
    takes = getattr(unwrapped(model), "in_chans", None)
    if takes is not None and takes != channels:
        raise InputError(f"{role} takes {takes} channels, but the images have {channels}")
    vit = _described(model)
    grid = _patch_grid(model) or (None if vit is None else (vit.grid, vit.patch_size, vit.channels))
    sparse = grid == (images.grid, images.patch_size, channels)
    if not sparse and images.sparsity > 0:
        warnings.warn(
            f"{role} is no ViT on the images' {images.grid[0]}x{images.grid[1]} grid of {images.patch_size} px patches: "
            f"it sees the missing {images.sparsity:.0%} of each image as the training mean",
            DenseFillWarning,
            stacklevel=3,
        )
    scale, shift = _statistics(vit if sparse else None, model, images)
    made = Reader(model, images.grid, sparse, scale, shift, num_classes=0)
    return replace(made, num_classes=_num_classes(made, images, role), fused=_fused_pass(vit) if frozen and sparse and vit is not None else None)


def _fused_pass(vit: ViT) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The fused engine's forward pass in float32; None for a model of another precision."""
    if vit.embed.weight.dtype != torch.float32:
        return None
    fused = Fused(vit.copy(), torch.float32)
    workspace = fused.workspace()
    return lambda patches, index: fused.forward_patches(patches.to(vit.device), index.to(vit.device), workspace)


def _patch_grid(model: nn.Module) -> tuple | None:
    """Grid, patch size and channels of a quantised ViT, which takes (patches, index) itself; None of any other model."""
    facts = getattr(model, "facts", None)
    return None if facts is None else (facts.grid, facts.patch_size, facts.channels)


def _described(model: nn.Module) -> ViT | None:
    """The description of a supported ViT, None of any other model."""
    try:
        return describe_weights(model)
    except InputError:
        return None


def _statistics(vit: ViT | None, model: nn.Module, images: SparseImages) -> tuple[Tensor | None, Tensor | None]:
    """x_model = x_images * scale + shift, where the model, read sparsely as `vit`, was trained on other statistics than the images have."""
    cfg = getattr(unwrapped(model), "pretrained_cfg", None) or {}
    mean, std = (vit.mean, vit.std) if vit is not None else (cfg.get("mean"), cfg.get("std"))
    if vit is None and normalises(model, images.patches.shape[2]):
        mean, std = (0.0,) * len(images.mean), (1.0,) * len(images.std)  # it takes fractions of white
    if not mean or not std or len(mean) != len(images.mean) or (tuple(mean), tuple(std)) == (images.mean, images.std):
        return None, None
    mine, theirs = (torch.tensor([tuple(m), tuple(s)], dtype=torch.float32) for m, s in ((images.mean, images.std), (mean, std)))
    return mine[1] / theirs[1], (mine[0] - theirs[0]) / theirs[1]


def _num_classes(made: Reader, images: SparseImages, role: str) -> int:
    """Width of the model's logits for one image."""
    device = next((tensor.device for tensor in (*made.model.parameters(), *made.model.buffers())), torch.device("cpu"))
    one = images[:1].to(device)
    probe = made if made.sparse else replace(made, model=copy.deepcopy(made.model).eval())  # a pass in training mode would change batch statistics
    try:
        with torch.no_grad():
            logits = probe(one.patches.float(), one.index)
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        height, width = images.image_size
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{role} cannot take images of {one.patches.shape[2]}x{height}x{width}: {reason}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise InputError(f"{role} must return logits [B, classes]")
    return logits.shape[1]


@torch.no_grad()
def logits(read: Callable[[Tensor, Tensor], Tensor], images: SparseImages, device: torch.device | str, batch_size: int = 256) -> Tensor:
    """Logits [M, classes] of all images on the CPU, computed a batch at a time on `device`."""
    parts = zip(images.patches.split(batch_size), images.index.split(batch_size), strict=True)
    return torch.cat([read(patches.to(device).float(), index.to(device)).float().cpu() for patches, index in parts])
