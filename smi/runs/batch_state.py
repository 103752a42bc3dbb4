"""The state of a batch within its run, as named tensors: pixels, moments, active patches, generators, and the images that PRI has emitted so far."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ..inversion.schedules import Schedule
from ..models.levels import Model
from .checkpoint import Checkpoint

Emitted = list[tuple[Tensor, Tensor]]  # patches [B, n, C, p, p] and cells int64 [B, n] of each stage


def save(
    checkpoint: Checkpoint,
    iteration: int,
    images: Tensor,
    moments: tuple[Tensor, Tensor],
    index: Tensor,
    generators: Sequence[Generator],
    emitted: Emitted,
) -> None:
    """Write what a batch is before the update of `iteration`."""
    state = {"iteration": torch.tensor(iteration), "images": images, "first": moments[0], "second": moments[1], "index": index}
    state["generators"] = torch.stack([generator.get_state() for generator in generators])
    for stage, (patches, cells) in enumerate(emitted):
        state |= {f"patches.{stage}": patches, f"cells.{stage}": cells}
    checkpoint.save(state)


def restore(
    checkpoint: Checkpoint,
    schedule: Schedule,
    vit: Model,
    images: Tensor,
    moments: tuple[Tensor, Tensor],
    index: Tensor,
    generators: Sequence[Generator],
) -> tuple[int, Tensor, Emitted]:
    """The next iteration, the active patches and what was emitted; images, moments and generators are set in place. Where there is no checkpoint that
    fits, all stay as they are."""
    found = checkpoint.load(("iteration", "images", "first", "second", "index", "generators"))
    if found is None or not _fits(found, schedule, vit, images, generators):
        return 0, index, []
    for held, name in ((images, "images"), (moments[0], "first"), (moments[1], "second")):
        held.copy_(found[name])
    for generator, state in zip(generators, found["generators"], strict=True):
        generator.set_state(state.clone())  # torch refuses a view
    checkpoint.restore_beside(found)
    emitted = [(found[f"patches.{stage}"].to(images.device), found[f"cells.{stage}"].to(images.device)) for stage in range(_stages(found))]
    return int(found["iteration"]), found["index"].to(images.device), emitted


def _stages(found: dict[str, Tensor]) -> int:
    return sum(name.startswith("cells.") for name in found)


def _fits(found: dict[str, Tensor], schedule: Schedule, vit: Model, images: Tensor, generators: Sequence[Generator]) -> bool:
    """Whether every tensor is what this batch has at that iteration."""
    iteration = int(found["iteration"]) if found["iteration"].numel() == 1 else -1
    stage = next((stage for stage in schedule.stages() if stage.start <= iteration < stage.stop), None)
    if stage is None:
        return False
    batch, size = len(images), (vit.channels, vit.patch_size, vit.patch_size)
    states = torch.stack([generator.get_state() for generator in generators])
    wanted = {"images": images, "first": images, "second": images, "generators": states}
    cells = {"index": (batch, stage.active)}
    emitting = [event for event in schedule.events if event.iteration <= iteration and event.fate == "emit"]
    for place, event in enumerate(emitting):
        wanted[f"patches.{place}"] = images.new_empty(batch, event.count, *size, device="meta")
        cells[f"cells.{place}"] = (batch, event.count)
    alike = all(name in found and (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype) for name, tensor in wanted.items())
    return (
        alike
        and all(map(_is_state, found["generators"]))
        and all(
            name in found
            and found[name].dtype == torch.int64
            and tuple(found[name].shape) == shape
            and 0 <= int(found[name].min()) <= int(found[name].max()) < vit.num_patches
            for name, shape in cells.items()
        )
    )


def _is_state(state: Tensor) -> bool:
    """Whether a generator takes it."""
    try:
        torch.Generator().set_state(state.clone())
    except RuntimeError:
        return False
    return True
