"""Students that learn from the images: a copy of the teacher, a small one, and a linear probe on a trunk that learned other classes."""

import copy
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

import smi
from smi.distillation import partly_fresh, small_student
from smi.errors import InputError
from smi.models.folder import DESCRIPTION, architecture, build, load_model_folder, save_model

from .config import Config
from .learning import learn
from .teacher import real_data, teacher_of

CURVE_POINTS = 10


def transfer(config: Config, images: smi.SparseImages, seed: int, kind: str, output: Path, folder: Path) -> dict:
    """Accuracy on real test images of a student that learns from the images, and its learning curve.

    kind: one of STUDENTS. output: what distillation writes goes there. folder: of the evidence, which keeps the trunk.
    """
    teacher, evaluation = teacher_of(config.teacher), real_data(config, "test")
    if kind == "copy":
        student, steps, given = partly_fresh(teacher, config.fresh_blocks, seed), config.copy_steps, {}
    elif kind == "small":
        student, steps, given = small_student(teacher, seed), config.small_steps, {}
    else:
        student, steps, given = trunk(config, folder), config.trunk_steps, {"head_only": True, "lr": 0.1, "patch_dropout": 0.0}
        teacher, images, evaluation = _later_classes(teacher, images, evaluation)
    result = smi.distill(
        teacher,
        student,
        images,
        preset="adamw",
        steps=steps,
        batch_size=config.student_batch,
        eval_every=max(1, steps // CURVE_POINTS),
        evaluation=evaluation,
        output=output,
        progress=False,
        seed=seed,
        **given,
    )
    curve = [{name: point[name] for name in ("step", "seconds", "kl", "accuracy")} for point in result.curve]
    return {kind: result.accuracy, f"{kind}_curve": curve}


def _later_classes(
    teacher: nn.Module, images: smi.SparseImages, evaluation: tuple[Tensor, Tensor]
) -> tuple[nn.Module, smi.SparseImages, tuple[Tensor, Tensor]]:
    """The teacher, images and real data of the second half of the classes, which the trunk has not seen."""
    first = teacher.num_classes // 2
    kept = images.labels >= first
    if not kept.any():
        raise InputError(f"no image shows one of the classes {first} to {teacher.num_classes - 1}, which the trunk has to learn: make more --images")
    images = smi.SparseImages(
        images.patches[kept], images.index[kept], images.labels[kept] - first, images.trajectory[kept], images.stage[kept], images.grid,
        images.mean, images.std,
    )  # fmt: skip
    real_images, labels = evaluation
    return _with_classes(teacher, first, teacher.num_classes), images, (real_images[labels >= first], labels[labels >= first] - first)


def _with_classes(teacher: nn.Module, start: int, stop: int) -> nn.Module:
    """The teacher, answering with some of its classes alone."""
    sliced = copy.deepcopy(teacher)
    head = nn.Linear(teacher.head.in_features, stop - start)
    with torch.no_grad():
        head.weight.copy_(teacher.head.weight[start:stop])
        head.bias.copy_(teacher.head.bias[start:stop])
    sliced.head, sliced.num_classes = head, stop - start
    return sliced.eval()


def trunk(config: Config, folder: Path) -> nn.Module:
    """A student of the teacher's architecture whose trunk learned the first half of the classes from real images; its head is newly initialised."""
    path = folder / "trunk"
    with FileLock(folder / "trunk.lock"):  # processes side by side want the same one
        if not (path / DESCRIPTION).exists():
            save_model(_learned_trunk(config), path)
    return load_model_folder(path)


def _learned_trunk(config: Config) -> nn.Module:
    teacher = teacher_of(config.teacher)
    first = teacher.num_classes // 2
    images, labels = real_data(config, "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = build(architecture(teacher))
        student.pretrained_cfg = teacher.pretrained_cfg
        student.reset_classifier(first)
        learn(student.train(), images[labels < first], labels[labels < first], config.trunk_learning)
        student.reset_classifier(teacher.num_classes - first)
    return student.eval()
