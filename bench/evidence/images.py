"""Images of a method and a seed, real ones included, and their FLOPs."""

from dataclasses import replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

import smi
from smi import cost
from smi.engine.reference import forward
from smi.images.patches import to_patches
from smi.inversion.schedules import Schedule, make_schedule
from smi.models.vit import describe
from smi.random_streams import generator

from .columns import ROWS
from .config import Config
from .teacher import real_data, teacher_of


def inversion_settings(config: Config, row: str) -> dict:
    """Settings of smi.invert for a row."""
    method = ROWS[row]
    made = {"method": method.name, **method.options, "num_images": config.images, "batch_size": config.batch_size, "progress": False}
    if row != "gaussian":
        made["iterations"] = config.iterations
    if row not in ("gaussian", "psaq"):  # PSAQ brings its own total variation
        made["tv_weight"] = config.tv_weight
    if row != "gaussian":
        made["engine"] = "reference" if row == "psaq" else config.engine
    return made


def schedule_of(config: Config, row: str) -> Schedule:
    """PSAQ-ViT keeps all patches, as dense inversion does."""
    vit = describe(teacher_of(config.teacher))
    name = "dense" if row == "psaq" else ROWS[row].name
    return make_schedule(name, vit.num_patches, config.iterations, **ROWS[row].options)


def count_flops(config: Config, row: str) -> tuple[float, float]:
    """GFLOP of the ViT per finished image as PyTorch counts those of every stage, and their ratio to the cost model."""
    vit, schedule = describe(teacher_of(config.teacher)).to("meta", torch.float32), schedule_of(config, row)
    counted = 0
    for stage in schedule.stages():
        images = torch.empty(1, vit.channels, *vit.image_size, device="meta", requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            logits = forward(vit, images, torch.empty(1, stage.active, device="meta", dtype=torch.int64)).logits
            torch.autograd.grad(logits.sum(), images)
        counted += (stage.stop - stage.start) * counter.get_total_flops()
    per_image = counted / schedule.images_per_trajectory
    return per_image / 1e9, per_image / cost.image_flops(vit, schedule)


@cache
def warm_up(config: Config, row: str) -> None:
    """What the first images of a process would pay for: imports, the teacher, the engine's buffers."""
    if row == "real":
        real_data(config, "train")
    else:
        invert(replace(config, images=1, iterations=7, batch_size=1), row, 0)


def invert(config: Config, row: str, seed: int) -> smi.SparseImages:
    teacher = teacher_of(config.teacher)
    labels = None if config.data == "imagenet" else range(describe(teacher).num_classes)  # drawn from the seed, or all in turn
    return smi.invert(teacher, labels=labels, seed=seed, **inversion_settings(config, row))


def real_images(config: Config, seed: int) -> smi.SparseImages:
    """As many real images of the training split, all patches kept."""
    images, labels = real_data(config, "train")
    chosen = torch.randperm(len(images), generator=generator(seed, "real"))[: config.images]
    vit = describe(teacher_of(config.teacher))
    patches, numbers = to_patches(images[chosen], vit.patch_size), torch.arange(len(chosen))
    index = torch.arange(vit.num_patches).expand(len(chosen), -1).contiguous()
    return smi.SparseImages(patches, index, labels[chosen], numbers, torch.zeros_like(numbers), vit.grid, vit.mean, vit.std, {"method": "real"})
