"""The settings of the evidence: what decides its numbers, from the options of the command."""

import argparse
import os
from dataclasses import dataclass, fields
from pathlib import Path

from smi.datasets import VARIABLES
from smi.errors import InputError

COUNTS = ("seeds", "jobs", "threads", "images", "iterations", "batch_size", "student_batch", "test_images")
IMAGENET_TEACHER = "deit_tiny_patch16_224.safetensors"  # the architecture is its name
DEFAULTS = {
    "teacher": "digits", "images": 252, "iterations": 200, "engine": "reference", "batch_size": 63, "tv_weight": 5e-3, "fresh_blocks": 2,
}  # fmt: skip
OF_DATA: dict[str, dict] = {  # where they are others
    "cifar10": {"fresh_blocks": 4, "test_images": 2000},
    "imagenet": {"images": 32, "iterations": 20, "engine": "fused", "batch_size": 32, "tv_weight": 1e-4},
}
COUNTS += ("copy_steps", "small_steps", "trunk_steps", "trunk_learning")


@dataclass(frozen=True)
class Config:
    """What decides the numbers; folders of another one are not mixed with it."""

    data: str
    teacher: str
    images: int  # finished ones of each method
    iterations: int
    engine: str  # that makes the images; PSAQ-ViT's loss always needs the reference
    batch_size: int  # trajectories
    tv_weight: float
    copy_steps: int
    small_steps: int
    trunk_steps: int  # of its linear probe
    trunk_learning: int  # steps in which the trunk learns the other classes
    fresh_blocks: int  # last blocks of the copy that are re-initialised
    student_batch: int  # images
    test_images: int | None  # of which accuracy is measured; None: all
    threads: int


def make_config(given: argparse.Namespace) -> Config:
    """The options as they were given, the others as the data needs them. Raises InputError where they cannot be."""
    if given.data == "cifar10" and given.teacher is None:
        raise InputError("cifar10 needs a teacher: pass the folder that smi.teachers.train_cifar10 wrote as --teacher")
    for name in COUNTS:
        if (value := getattr(given, name)) is not None and value < 1:
            raise InputError(f"{name.replace('_', '-')} must be at least 1, got {value}")
    settings = {field.name: getattr(given, field.name) for field in fields(Config)}
    defaults = {**DEFAULTS, **OF_DATA.get(given.data, {})}
    if given.data == "imagenet" and settings["teacher"] is None:
        settings["teacher"] = str(_imagenet() / IMAGENET_TEACHER)
    return Config(**settings | {name: value for name, value in defaults.items() if settings[name] is None})


def _imagenet() -> Path:
    """The folder of images and teacher."""
    if not os.environ.get(VARIABLES["imagenet"]):
        raise InputError(f"imagenet does not come with the package: pass its folder as --path, or set {VARIABLES['imagenet']}")
    return Path(os.environ[VARIABLES["imagenet"]])
