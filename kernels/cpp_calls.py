"""Calls of the C++ for the CPU (csrc/cpu) on all images of a batch, made at once or, within `collected`, put in a list for later."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor

from smi.csrc import host

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # of activations; statistics and attention weights are float32


class Part(ctypes.Structure):
    """As in csrc/cpu/parallel.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("begin", "end", "of")]


WHOLE_BATCH = Part(0, 1, 1)


class Call(NamedTuple):
    """A call that was not made yet. tensors: those whose memory params names, so that they live as long; cost: arithmetic operations."""

    function: Callable
    params: ctypes.Structure
    tensors: tuple[Tensor | None, ...]
    cost: float

    def make(self) -> None:
        """Make it, on all images and in all threads."""
        self.function(ctypes.byref(self.params), WHOLE_BATCH)


class _Thread(local):
    collected: list[Call] | None = None


_thread = _Thread()


@contextmanager
def collected() -> Iterator[list[Call]]:
    """Within it, in this thread, calls are put in the list that it gives instead of being made."""
    before, calls = _thread.collected, []
    _thread.collected = calls
    try:
        yield calls
    finally:
        _thread.collected = before


def unless_taken(*tensors: object) -> str | None:
    """Why activations cannot be taken: not all tensors among the arguments are float32, or bfloat16 and what comes with it in float32."""
    if any(tensor.dtype not in DTYPES for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()):
        return "it takes float32 and bfloat16 alone"
    return None


def call(name: str, params: ctypes.Structure, *tensors: Tensor | None, cost: float) -> None:
    """Call a function of the library on all images, now or in its turn. tensors: those that params names; cost: arithmetic operations."""
    function = getattr(host.library(), name)
    if _thread.collected is None:
        function(ctypes.byref(params), WHOLE_BATCH)
    else:
        _thread.collected.append(Call(function, params, tensors, cost))


def dense(x: Tensor) -> Tensor:
    """x, contiguous. Raises RuntimeError where that would take a copy and calls are collected: the copy would be made now, before x is computed."""
    if x.is_contiguous():
        return x
    if _thread.collected is not None:
        raise RuntimeError(f"what is recorded must be contiguous, got shape {tuple(x.shape)} with strides {x.stride()}")
    return x.contiguous()
