"""Every method on one model, the same number of images: seconds, FLOPs, and whether the model recognises them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import cost
from ..images.forward import forward_sparse
from ..images.sparse_images import SparseImages
from ..inversion.loop import invert
from ..inversion.methods import DENSE, PRI2, PRI4, PRI7, SMI, Method
from ..inversion.schedules import make_schedule
from ..models.vit import describe

METHODS = (DENSE, SMI, PRI2, PRI4, Method("pri", 4, importance="random"), PRI7)  # random: what attention has to beat
NUM_IMAGES = 84  # whole trajectories for v = 2, 4 and 7
ITERATIONS = 200
WARM_UP = 4  # iterations


@dataclass(frozen=True)
class Row:
    """One method's line of the table."""

    method: str  # title
    sparsity: float
    images: int
    seconds: float
    speedup: float  # images per second over dense, measured
    flops_speedup: float  # the same as FLOPs per image predict
    agreement: float  # fraction of the images that the teacher assigns to their label
    folder: str  # name of the folder of its images
    images_per_second: float


@torch.no_grad()
def agreement(model: nn.Module, images: SparseImages) -> float:
    """Fraction of the images that the model assigns to their label."""
    return (forward_sparse(model, images).argmax(1).cpu() == images.labels).double().mean().item()


def compare(
    model: nn.Module,
    methods: Sequence[Method] = METHODS,
    *,
    num_images: int = NUM_IMAGES,
    iterations: int = ITERATIONS,
    output: Path | None = None,
    force: bool = False,
    **settings,
) -> tuple[list[Row], dict[Method, SparseImages]]:
    """Invert the model with every method, dense first, and measure; the images go to OUTPUT/<method's key>. settings: those of `smi.invert`."""
    vit = describe(model)
    schedules = [make_schedule(method.name, vit.num_patches, iterations, division=method.division) for method in methods]
    dense_flops = cost.image_flops(vit, make_schedule("dense", vit.num_patches, iterations))
    invert(model, method="dense", num_images=1, iterations=WARM_UP, **{**settings, "progress": False})  # allocator and thread pool
    rows: list[Row] = []
    made: dict[Method, SparseImages] = {}
    for method, schedule in zip(methods, schedules, strict=True):
        folder = None if output is None else output / method.key
        began = time.perf_counter()
        images = invert(
            model, method=method.name, num_images=num_images, iterations=iterations, output=folder, force=force, **method.options, **settings
        )
        seconds = time.perf_counter() - began
        rows.append(
            Row(
                method=method.title,
                sparsity=schedule.sparsity,
                images=len(images),
                seconds=seconds,
                speedup=(rows[0].seconds if rows else seconds) / seconds,
                flops_speedup=dense_flops / cost.image_flops(vit, schedule),
                agreement=agreement(model, images),
                folder=method.key,
                images_per_second=len(images) / seconds,
            )
        )
        made[method] = images
    return rows, made
