"""The settings of the evidence: what decides its numbers, from the options of the command."""

import argparse
from dataclasses import dataclass, fields

from smi.errors import InputError

COUNTS = ("seeds", "jobs", "threads", "images", "iterations", "batch_size", "student_batch", "test_images")
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
    cifar = given.data == "cifar10"
    if cifar and given.teacher is None:
        raise InputError("cifar10 needs a teacher: pass the folder that smi.teachers.train_cifar10 wrote as --teacher")
    for name in COUNTS:
        if (value := getattr(given, name)) is not None and value < 1:
            raise InputError(f"{name.replace('_', '-')} must be at least 1, got {value}")
    settings = {field.name: getattr(given, field.name) for field in fields(Config)}
    defaults = {"teacher": "digits", "fresh_blocks": 4 if cifar else 2, "test_images": 2000 if cifar else None}
    return Config(**settings | {name: value for name, value in defaults.items() if settings[name] is None})
