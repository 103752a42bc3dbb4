"""Bytes of the activations that autograd saves for backward."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Tensor], beside: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves while `forward` runs, those of the tensors `beside` (weights, pixels) left out."""
    known = {tensor.untyped_storage()._cdata for tensor in beside}
    found: dict[int, int] = {}
    alive = []  # so that no storage's address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(found.values())
