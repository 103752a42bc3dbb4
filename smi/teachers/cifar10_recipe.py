"""How a teacher is trained on CIFAR-10: two recipes as data, and what they ask for at each step."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..random_streams import generator

CLASSES = 10


@dataclass(frozen=True)
class Recipe:
    """How a teacher is trained."""

    architecture: dict[str, Any]  # arguments of VisionTransformer
    epochs: int
    batch_size: int
    lr: float
    mixup: float  # probability of mixing a batch with itself
    kept: tuple[float, float]  # least and largest fraction of the patches that a step sees, at first
    kept_late: tuple[float, float]  # the same in the last part of the training
    late: float = 0.3  # the fraction of the steps that are that part
    weight_decay: float = 0.05
    warmup: float = 0.05  # fraction of the steps
    noise: float = 0.2  # largest standard deviation of the noise, in those of the pixels
    shift: int = 4  # pixels of 32
    smoothing: float = 0.1  # of the labels
    smoothing_late: float = 0.0  # students learn more from a teacher whose labels are not smoothed (bench/NOTES.md)
    mimetic: bool = True  # initialisation
    bfloat16: bool = False


PRESETS = {
    "cpu": Recipe(
        {"img_size": 32, "patch_size": 4, "num_classes": CLASSES, "embed_dim": 128, "depth": 6, "num_heads": 4},
        epochs=14,
        batch_size=128,
        lr=2e-3,
        mixup=0.0,
        kept=(0.25, 0.5),
        kept_late=(0.25, 1.0),
    ),
    "gpu": Recipe(  # DeiT-Tiny/16
        {"img_size": 224, "patch_size": 16, "num_classes": CLASSES, "embed_dim": 192, "depth": 12, "num_heads": 3},
        epochs=200,
        batch_size=512,
        lr=1e-3,
        mixup=0.5,
        kept=(0.25, 0.75),
        kept_late=(0.25, 1.0),
        bfloat16=True,
    ),
}


def smoothing(recipe: Recipe, step: int, steps: int) -> float:
    """How much the labels of a step are smoothed."""
    return recipe.smoothing_late if _is_late(recipe, step, steps) else recipe.smoothing


def kept_share(recipe: Recipe, step: int, steps: int, seed: int) -> float:
    """The fraction of the patches that a step sees."""
    least, most = recipe.kept_late if _is_late(recipe, step, steps) else recipe.kept
    return least + (most - least) * torch.rand(1, generator=generator(seed, "kept", step)).item()


def _is_late(recipe: Recipe, step: int, steps: int) -> bool:
    return step >= (1 - recipe.late) * steps


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Of a step: linear warm-up and cosine."""
    return recipe.lr * min((step + 1) / (recipe.warmup * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
