"""Every method on one model, the same number of images: seconds, FLOPs, and whether the model recognises them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import cost
from ..images.forward import forward_sparse
from ..images.sparse_images import SparseImages
from ..inversion.loop import invert
from ..inversion.schedules import Schedule, make_schedule
from ..models.vit import ViT, describe

METHODS = (
    ("dense", {}),
    ("smi", {}),
    ("pri", {"division": 2}),
    ("pri", {"division": 4}),
    ("pri", {"division": 4, "importance": "random"}),  # what attention has to beat
    ("pri", {"division": 7}),
)
NUM_IMAGES = 84  # whole trajectories for v = 2, 4 and 7
ITERATIONS = 200
WARM_UP = 4  # iterations


@dataclass(frozen=True)
class Row:
    """One method's line of the table."""

    method: str
    sparsity: float
    images: int
    seconds: float
    speedup: float  # images per second over dense, measured
    flops_speedup: float  # the same as FLOPs per image predict
    agreement: float  # share of the images that the teacher assigns to their label

    @property
    def folder(self) -> str:
        """The name of the folder of its images."""
        return folder_name(self.method)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def title(method: str, options: dict) -> str:
    name = {"dense": "dense", "smi": "SMI"}.get(method, f"PRI v={options.get('division')}")
    return f"{name}, {options['importance']}" if "importance" in options else name


def folder_name(title: str) -> str:
    return title.lower().replace(" v=", "").replace(", ", "-")


@torch.no_grad()
def agreement(model: torch.nn.Module, images: SparseImages) -> float:
    """Share of the images that the model assigns to their label."""
    return (forward_sparse(model, images).argmax(1).cpu() == images.labels).double().mean().item()


def compare(
    model: torch.nn.Module,
    methods: Sequence[tuple[str, dict]] = METHODS,
    *,
    num_images: int = NUM_IMAGES,
    iterations: int = ITERATIONS,
    output: Path | None = None,
    force: bool = False,
    **settings,
) -> tuple[list[Row], dict[str, SparseImages]]:
    """Invert the model with every method, dense first, and measure. settings: those of `smi.invert`."""
    vit = describe(model)
    rows: list[Row] = []
    made: dict[str, SparseImages] = {}
    invert(model, method="dense", num_images=1, iterations=WARM_UP, **{**settings, "progress": False})  # allocator and thread pool
    schedules = [_schedule(vit, method, iterations, options) for method, options in methods]
    for (method, options), schedule in zip(methods, schedules, strict=True):
        name = title(method, options)
        folder = None if output is None else output / folder_name(name)
        began = time.perf_counter()
        images = invert(model, method=method, num_images=num_images, iterations=iterations, output=folder, force=force, **options, **settings)
        seconds = time.perf_counter() - began
        flops = cost.image_flops(vit, schedule)
        dense_seconds, dense_flops = (
            (rows[0].seconds, cost.image_flops(vit, make_schedule("dense", vit.num_patches, iterations))) if rows else (seconds, flops)
        )
        row = Row(name, schedule.sparsity, len(images), seconds, dense_seconds / seconds, dense_flops / flops, agreement(model, images))
        rows.append(row)
        made[row.method] = images
    return rows, made


def _schedule(vit: ViT, method: str, iterations: int, options: dict) -> Schedule:
    return make_schedule(method, vit.num_patches, iterations, division=options.get("division"))
