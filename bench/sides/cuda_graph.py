"""A step as one CUDA graph."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smi.kernels import timing


def captured_step(run: Callable[[], object], state: Sequence[Tensor], device: torch.device) -> Callable[[], object]:
    """`run` as one CUDA graph, the `state` that its warm-up moved put back; `run` itself on the CPU."""
    if device.type != "cuda":
        return run
    before = [tensor.clone() for tensor in state]
    replay = timing.captured(run, device)
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    return replay
