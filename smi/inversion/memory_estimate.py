"""How much memory an iteration takes, found by running it on tensors that hold no data, and which batch size fits."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import engine
from ..errors import RunError
from ..models.description import ViT
from ..models.levels import Model
from .losses import default_losses
from .schedules import Schedule

CPU_SLACK = 1.75  # resident over counted bytes, DeiT-Tiny at batch 20: the C allocator keeps and splits freed blocks
STEP_BUFFERS = 8  # image-sized tensors that stay or pass through Adam: pixels, gradient, two moments, and the update's temporaries


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one iteration needs at its peak."""

    weights: int
    pass_peak: int  # of the forward and backward pass
    images: int  # pixels, optimiser state and the update's temporaries

    @property
    def beside_weights(self) -> int:
        return self.pass_peak + self.images

    @property
    def total(self) -> int:
        return self.weights + self.beside_weights


class PeakMemory(TorchDispatchMode):
    """Within it, bytes of the tensors alive at the same time that operations have made; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live: set[int] = set()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        if storage._cdata not in self.live:
            self.live.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.bytes -= size


def step_memory(vit: ViT, batch: int, active: int, fused: engine.Mode | None = None) -> StepMemory:
    """Memory of one iteration of the default loss on `batch` trajectories with `active` patches each. fused: the fused engine's mode, None for the
    reference engine."""
    device, vit = vit.device, vit.to("meta", vit.embed.weight.dtype)
    images = torch.empty(batch, vit.channels, *vit.image_size, device="meta", dtype=vit.embed.weight.dtype, requires_grad=True)
    weights = sum(tensor.nbytes for tensor in vit.tensors())
    if fused is not None:
        copies = 2 if device.type == "cpu" else 1  # laid out for both directions, or in its dtype
        weights += copies * weights * fused.dtype.itemsize // images.itemsize
        return StepMemory(weights, engine.pass_bytes(vit, batch, active, fused), STEP_BUFFERS * images.nbytes)
    index = torch.empty(batch, active, device="meta", dtype=torch.int64)
    labels = torch.empty(batch, device="meta", dtype=torch.int64)
    with PeakMemory() as memory:
        output = engine.forward(vit, images, index, torch.empty(3, device="meta", dtype=torch.int32))
        loss: Any = sum(term(images, output.logits, labels) for term in default_losses())
        torch.autograd.grad(loss, images)
    return StepMemory(weights, memory.peak, STEP_BUFFERS * images.nbytes)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return psutil.virtual_memory().available


def fitting_batch(vit: ViT, schedule: Schedule, available: int, fused: engine.Mode | None = None) -> int:
    """The largest batch of trajectories whose first stage, the widest, fits into `available` bytes beside the weights, which are already there; 0 if
    none does."""
    one, two = (step_memory(vit, batch, schedule.num_patches, fused).beside_weights * _slack(vit) for batch in (1, 2))
    each = two - one
    return max(0, int((available - (one - each)) // each))


def _slack(vit: ViT) -> float:
    return CPU_SLACK if vit.device.type == "cpu" else 1.0


def chunk_of(vit: ViT, schedule: Schedule, batch: int, limit: float, fused: engine.Mode) -> int:
    """How many trajectories' passes run together so that a batch stays within `limit` GiB beside the weights. Raises RunError where not even one
    does."""
    slack = _slack(vit)
    one, two = (step_memory(vit, count, schedule.num_patches, fused) for count in (1, 2))
    images, each = batch * one.images * slack, (two.pass_peak - one.pass_peak) * slack
    fits = int((limit * 2**30 - images - (one.pass_peak * slack - each)) // each)
    if fits < 1:
        need = (images + one.pass_peak * slack) / 2**30
        raise RunError(f"max_memory {limit:g} GiB does not hold one trajectory's pass beside the images of the batch: allow at least {need:.2g} GiB")
    return min(fits, batch)


def check_memory(vit: ViT, schedule: Schedule, batch: int, fused: engine.Mode | None = None) -> None:
    """Raise RunError before a run that cannot fit, naming the batch size that does."""
    available = available_memory(vit.device)
    if step_memory(vit, batch, schedule.num_patches, fused).beside_weights * _slack(vit) > available:
        raise out_of_memory(vit, schedule, batch, available, fused)


def ran_out(error: Exception) -> bool:
    """Whether an error says that memory could not be had; on the CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def out_of_memory(vit: Model, schedule: Schedule, batch: int, available: int | None = None, fused: engine.Mode | None = None) -> RunError:
    """The error that says which batch size fits; call it when the tensors of the failed pass are gone."""
    if not isinstance(vit, ViT):
        return RunError(f"out of memory: a batch of {batch} does not fit on {vit.device}; pass a smaller batch_size (--batch-size)")
    most = batch - 1 if available is not None else batch // 2  # the batch that ran out was estimated to fit
    if available is None:
        if vit.device.type == "cuda":
            torch.cuda.empty_cache()
        available = available_memory(vit.device)
    fits = min(fitting_batch(vit, schedule, available, fused), most)
    need = step_memory(vit, batch, schedule.num_patches, fused)
    advice = f"about {fits} fit: pass batch_size={fits} (--batch-size {fits})" if fits else "not even one fits: use another device or a smaller model"
    sizes = f"needs {(need.weights + need.beside_weights * _slack(vit)) / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free on {vit.device}"
    return RunError(f"out of memory: a batch of {batch} trajectories {sizes}; {advice}")
