"""Models, and the step of any side by its name."""

from typing import Protocol

import timm
import torch
from torch import Tensor, nn

from smi.models.vit import describe

from . import compiled, eager, ours


class Step(Protocol):
    """One optimisation step of a side. Called, it takes the step and returns the loss []."""

    images: Tensor  # [B, C, H, W], moved by every call
    dtype: str  # of the model's arithmetic
    resolved: str  # what it runs in, as the rows say it

    def __call__(self) -> Tensor: ...

    def kept_bytes(self) -> int:
        """Bytes of the activations that a forward pass saves for backward."""


def build_model(name: str, options: dict, device: torch.device) -> nn.Module:
    """A timm model with random weights: no time depends on them."""
    torch.manual_seed(0)
    return timm.create_model(name, **options).to(device).eval()


def make_step(
    side: str, model: nn.Module, batch: int, active: int | None, *, copy_model: bool = True, dtype: str = "auto", variant: str | None = None
) -> Step:
    """The step of "ours", "recompute" (ours with that option), "compiled" or "eager".

    active: patches of each image, None for all. copy_model: False lets eager convert the caller's. dtype: of all but eager. variant: of compiled.
    """
    active = describe(model).num_patches if active is None else active
    if side in ("ours", "recompute"):
        return ours.make_step(model, batch, active, dtype=dtype, recompute=side == "recompute")
    if side == "eager":
        return eager.make_step(model, batch, active, copy_model=copy_model)
    return compiled.make_step(model, batch, active, dtype=None if dtype == "auto" else ours.DTYPES[dtype], variant=variant)
