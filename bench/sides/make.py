"""Models, and the step of any side by its name."""

import timm
import torch
from torch import nn

from smi.models.vit import describe

from . import compiled, eager, ours


def build_model(name: str, options: dict, device: torch.device) -> nn.Module:
    """A timm model with random weights: no time depends on them."""
    torch.manual_seed(0)
    return timm.create_model(name, **options).to(device).eval()


def make_step(side: str, model: nn.Module, batch: int, active: int | None, *, own: bool = True, dtype: str = "auto", variant: str | None = None):
    """The step of "ours", "recompute" (ours with that option), "compiled" or "eager". own: the baselines copy the model. dtype: of all but eager;
    variant: of compiled."""
    active = describe(model).num_patches if active is None else active
    if side in ("ours", "recompute"):
        return ours.make_step(model, batch, active, dtype=dtype, recompute=side == "recompute")
    if side == "eager":
        return eager.eager_step(model, batch, active, own=own)
    return compiled.compiled_step(model, batch, active, dtype=None if dtype == "auto" else ours.DTYPES[dtype], variant=variant)
