"""The precision in which references compute: at least float32, float64 where the caller brings float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_widen: ContextVar[bool] = ContextVar("widen", default=True)


def wide(x: Tensor) -> Tensor:
    """x in float32 or, if it already is, in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if _widen.get() else x


@contextmanager
def same_precision() -> Iterator[None]:
    """Within it references compute in the dtype that they are given: the error that plain PyTorch makes, the yardstick of every faster version."""
    token = _widen.set(False)
    try:
        yield
    finally:
        _widen.reset(token)
