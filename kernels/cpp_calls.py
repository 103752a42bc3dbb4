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


def address(x: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> int | None:
    """Where x lies; None for None. Raises ValueError unless it is contiguous memory of `shape` and dtype on the CPU: the C++ takes sizes on trust."""
    if x is None:
        return None
    if x.shape != shape or x.dtype is not dtype or not x.is_cpu or not x.is_contiguous():
        raise ValueError(f"C++ takes contiguous {dtype} {list(shape)} on the CPU here, got {_described(x)}")
    return checked(x).data_ptr()


def address_of_rows(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> int:
    """The same for x with any strides but the last, which must be 1."""
    if x.shape != shape or x.dtype is not dtype or not x.is_cpu or (x.stride(-1) != 1 and x.shape[-1] > 1):
        raise ValueError(f"C++ takes {dtype} {list(shape)} with dense rows on the CPU here, got {_described(x)}")
    return checked(x).data_ptr()


def checked(x: Tensor) -> Tensor:
    """x. Raises ValueError where its memory ends before its last element, as of a storage that was resized."""
    if x.numel():
        last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        if (last + 1) * x.itemsize > x.untyped_storage().nbytes():
            raise ValueError(f"the memory of a tensor is gone or too small: {_described(x)} in {x.untyped_storage().nbytes()} bytes")
    return x


def in_range(name: str, x: Tensor | None, lowest: int, end: int) -> None:
    """Raise IndexError unless all whole numbers in x lie in [lowest, end): the C++ would read or write beyond the memory."""
    if x is not None and x.numel():
        least, most = map(int, x.aminmax())
        if least < lowest or most >= end:
            raise IndexError(f"{name} must lie from {lowest} to {end - 1}, got {least} to {most}")


def _described(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} with strides {list(x.stride())} on {x.device}"
