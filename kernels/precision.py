"""The precision in which references compute: at least float32, float64 where the caller brings float64."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32 or, if it already is, in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
