"""Which activation a module computes, told by what it answers and not by its name."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..kernels.linear_gelu.reference import ACTIVATIONS

CLOSE = 1e-6  # GELU and its tanh form are 5e-4 apart


@cache
def _known() -> tuple[Tensor, dict[str, Tensor]]:
    """Numbers, and what each activation makes of them."""
    x = torch.linspace(-5, 5, 101, dtype=torch.float32, device="cpu")
    return x, {name: function(x) for name, function in ACTIVATIONS.items()}


def name_of(module: Any) -> str | None:
    """The name that kernels.linear_gelu gives to an activation module; None where it has none."""
    with _disable_current_modes(), torch.no_grad():  # a mode of fake tensors has no numbers
        x, known = _known()
        try:
            answer = module(x.clone())
        except Exception:  # whatever it is, it is none of ours
            return None
        if not isinstance(answer, Tensor) or answer.shape != x.shape or answer.device.type != "cpu":
            return None
        return next((name for name, wanted in known.items() if (wanted - answer).abs().max() <= CLOSE), None)
