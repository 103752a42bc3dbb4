"""Calls of the C++ for the CPU, made at once or, within `recorded`, put together into a recording: a thread then takes its own images through all of
them. It is what a CUDA graph is on a GPU: no Python between the operations, no thread that waits for another, and what one operation leaves for the
next is still in the core's own cache."""

import ctypes
from collections.abc import Callable
from threading import local
from typing import TypeVar

import torch
from torch import Tensor

from smi.csrc import host

UNEVEN = 1.1  # most that the busiest thread may have, in mean shares: as much as was won by not waiting after each operation

Result = TypeVar("Result")


class Part(ctypes.Structure):
    """As in csrc/cpu/parallel.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("begin", "end", "of")]


class Call(ctypes.Structure):
    """As in csrc/cpu/recording.cpp."""

    _fields_ = [("run", ctypes.c_void_p), ("params", ctypes.c_void_p)]


WHOLE = Part(0, 1, 1)


class Recording:
    """Calls on so many images of so many tokens each, which `run` makes. They read and write the same memory every time."""

    def __init__(self, images: int, tokens: int):
        self.images, self.tokens, self.cost = images, tokens, 0.0
        self.steps: list[tuple] = []  # function, params, and the tensors whose memory they name, which live as long
        self.calls: ctypes.Array | None = None

    def run(self) -> None:
        """Make the calls: image by image, or one after the other in all threads where the images cannot be shared out evenly."""
        threads = torch.get_num_threads()
        if -(-self.images // threads) * threads > UNEVEN * self.images:
            for function, params, _ in self.steps:
                function(ctypes.byref(params), WHOLE)
            return
        if self.calls is None:
            pairs = (Call(ctypes.cast(function, ctypes.c_void_p), ctypes.addressof(params)) for function, params, _ in self.steps)
            self.calls = (Call * len(self.steps))(*pairs)
        sizes = map(ctypes.c_int64, (len(self.calls), self.images, self.tokens))
        host.library().smi_run_recording(self.calls, *sizes, ctypes.c_double(self.cost / max(self.images, 1)))


class _Thread(local):
    recording: Recording | None = None


_thread = _Thread()


def recorded(layers: Callable[[], Result], images: int, tokens: int) -> tuple[Result, Recording]:
    """What `layers` returns, to be filled by the recording of the calls that it would have made. It must do nothing but such calls, each of which
    treats every image apart: an operation of PyTorch in it would read what is not there yet."""
    before, found = _thread.recording, Recording(images, tokens)
    _thread.recording = found
    try:
        return layers(), found
    finally:
        _thread.recording = before


def call(name: str, params: ctypes.Structure, *tensors: Tensor | None, cost: float) -> None:
    """Call a function of the library on all images, now or in its turn. tensors: those that params names; cost: operations of arithmetic."""
    function, recording = getattr(host.library(), name), _thread.recording
    if recording is None:
        function(ctypes.byref(params), WHOLE)
        return
    recording.steps.append((function, params, tensors))
    recording.cost += cost


def dense(x: Tensor) -> Tensor:
    """x, contiguous. A recording cannot hold the copy that this may take, and says so."""
    if x.is_contiguous():
        return x
    if _thread.recording is not None:
        raise RuntimeError(f"what is recorded must be contiguous, got shape {tuple(x.shape)} with strides {x.stride()}")
    return x.contiguous()
