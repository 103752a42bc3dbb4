"""A pass through layers in C++, recorded once and then run without Python: each thread runs the whole recorded sequence of calls on its share of the
batch. It is what a CUDA graph is on a GPU: no Python between the operations, no thread that waits for another, and what one operation leaves for the
next is still in the core's own cache."""

import ctypes
from collections.abc import Callable
from typing import TypeVar

import torch

from smi.csrc import host

from ..cpp_calls import Call, collected

UNEVEN = 1.1  # most that the busiest thread may have, in mean shares: as much as was won by not waiting after each operation

Result = TypeVar("Result")


class Step(ctypes.Structure):
    """Call in csrc/cpu/recording.cpp."""

    _fields_ = [("run", ctypes.c_void_p), ("params", ctypes.c_void_p)]


class RecordedPass:
    """Calls on `images` images of `tokens` tokens each, which `run` makes. They read and write the same memory every time."""

    def __init__(self, calls: list[Call], images: int, tokens: int):
        self.calls, self.images, self.tokens = calls, images, tokens
        self.cost = sum(call.cost for call in calls) / max(images, 1)  # arithmetic operations of an image
        pairs = (Step(ctypes.cast(call.function, ctypes.c_void_p), ctypes.addressof(call.params)) for call in calls)
        self.steps = (Step * len(calls))(*pairs)
        self.memory = {id(tensor): (tensor, tensor.data_ptr()) for call in calls for tensor in call.tensors if tensor is not None}.values()

    def fits(self) -> bool:
        """Whether all that the calls read and write lies where it lay when they were recorded."""
        return all(tensor.data_ptr() == at for tensor, at in self.memory)

    def run(self) -> None:
        """Make the calls: image by image, or one after the other in all threads where the images cannot be shared out evenly."""
        threads = torch.get_num_threads()
        if -(-self.images // threads) * threads > UNEVEN * self.images:
            for call in self.calls:
                call.make()
            return
        sizes = map(ctypes.c_int64, (len(self.steps), self.images, self.tokens))
        host.library().smi_run_recording(self.steps, *sizes, ctypes.c_double(self.cost))


def record(layers: Callable[[], Result], images: int, tokens: int) -> tuple[Result, RecordedPass]:
    """What `layers` returns, to be filled whenever the recorded pass runs. It must do nothing but calls of the C++, each of which treats every image
    apart: an operation of PyTorch in it would read what is not there yet."""
    with collected() as calls:
        result = layers()
    return result, RecordedPass(calls, images, tokens)
