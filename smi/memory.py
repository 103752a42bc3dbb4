"""How much memory an iteration takes, found by running the engine without data, and which batch size fits."""

from dataclasses import dataclass

import torch

from . import engine
from .errors import RunError
from .models import ViT
from .schedules import Schedule

IMAGE_BUFFERS = 6  # image-sized tensors alive in a step: pixels, gradient, two moments, and two of the update's temporaries


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one iteration needs at its peak."""

    weights: int
    images: int  # pixels, gradient, optimiser state
    saved: int  # what the forward pass keeps for the backward pass

    @property
    def total(self) -> int:
        return self.weights + self.images + self.saved


def step_memory(vit: ViT, batch: int, active: int) -> StepMemory:
    """Memory of one iteration on `batch` trajectories with `active` patches each, counted exactly on tensors that hold no data."""
    vit = vit.to("meta", vit.embed.weight.dtype)
    weights = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in vit.tensors()}
    saved: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    images = torch.empty(batch, vit.channels, *vit.image_size, device="meta", dtype=vit.embed.weight.dtype, requires_grad=True)
    index = torch.empty(batch, active, device="meta", dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = engine.forward(vit, images, index, torch.empty(3, device="meta", dtype=torch.int32))
    saved.pop(images.untyped_storage()._cdata, None)
    del output
    return StepMemory(sum(weights.values()), IMAGE_BUFFERS * images.nbytes, sum(saved.values()))


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return psutil.virtual_memory().available


def fitting_batch(vit: ViT, schedule: Schedule, available: int) -> int:
    """The largest batch of trajectories whose first stage, the widest, fits into `available` bytes beside the weights, which are already there; 0 if
    none."""
    one, two = (step_memory(vit, batch, schedule.num_patches) for batch in (1, 2))
    each = two.total - one.total
    return max(0, (available - (one.total - one.weights - each)) // each)


def check_memory(vit: ViT, schedule: Schedule, batch: int) -> None:
    """Raise RunError before a run that cannot fit, naming the batch size that does."""
    need = step_memory(vit, batch, schedule.num_patches)
    available = available_memory(vit.device)
    if need.total - need.weights > available:
        raise out_of_memory(vit, schedule, batch, available)


def out_of_memory(vit: ViT, schedule: Schedule, batch: int, available: int | None = None) -> RunError:
    """The error that says which batch size fits."""
    if available is None:
        if vit.device.type == "cuda":
            torch.cuda.empty_cache()
        available = available_memory(vit.device)
    fits = min(fitting_batch(vit, schedule, available), batch - 1)
    need = step_memory(vit, batch, schedule.num_patches)
    advice = f"about {fits} fit: pass batch_size={fits} (--batch-size {fits})" if fits else "not even one fits: use another device or a smaller model"
    sizes = f"needs {need.total / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are free on {vit.device}"
    return RunError(f"out of memory: a batch of {batch} trajectories {sizes}; {advice}")
