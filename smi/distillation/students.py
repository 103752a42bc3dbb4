"""Students: a timm model by name, a small untrained ViT on the teacher's grid, or the teacher with its last blocks re-initialised."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..models.by_name import load_model
from ..models.levels import read_model
from ..models.unwrap import unwrapped
from ..random_streams import generator
from ..surroundings import neutral, seeded

SMALL: dict[str, Any] = {"embed_dim": 64, "depth": 3, "num_heads": 4}


def make_student(
    name: str, teacher: nn.Module, *, checkpoint: str | None = None, pretrained: bool = False, fresh_blocks: int | None = None, seed: int = 0
) -> nn.Module:
    """A student for a supported teacher, drawn from the seed.

    name: "small" (an untrained ViT of width 64 and 3 blocks on the teacher's grid), "teacher" (a copy of it, the last fresh_blocks blocks
    re-initialised, all of them when None), a folder that `save_model` wrote, or a timm architecture with random weights, those of a checkpoint, or
    timm's pretrained ones. An untrained student gets the teacher's channels, image size, class count and statistics. Raises InputError for what does
    not go together.
    """
    if fresh_blocks is not None and name != "teacher":
        raise InputError("re-initialised blocks (fresh_blocks) are those of a copy of the teacher: ask for them with the student 'teacher'")
    if name in ("teacher", "small") and (checkpoint or pretrained):
        raise InputError(f"the student '{name}' takes no checkpoint and no pretrained weights")
    if name == "teacher":
        return partly_fresh(teacher, _depth(teacher) if fresh_blocks is None else fresh_blocks, seed)
    if name == "small":
        return small_student(teacher, seed)
    if checkpoint or pretrained:
        return load_model(name, checkpoint=checkpoint)
    with _seeded(seed):
        return _untrained(name, teacher)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within it the global stream of random numbers, from which modules draw their weights, is set from the seed."""
    with neutral(), seeded(generator(seed, "student").initial_seed()):
        yield


def small_student(teacher: nn.Module, seed: int = 0, **options: Any) -> nn.Module:
    """An untrained ViT on the teacher's patch grid; options replace those of `SMALL`."""
    from timm.models.vision_transformer import VisionTransformer

    vit, _ = read_model(teacher)
    given: dict[str, Any] = {"img_size": vit.image_size, "patch_size": vit.patch_size, "in_chans": vit.channels, "num_classes": vit.num_classes}
    with _seeded(seed):
        student: Any = VisionTransformer(**{**given, **SMALL, **options})
    student.pretrained_cfg = {"architecture": "small", "mean": vit.mean, "std": vit.std, "flip": vit.flip, **vit.view.cfg()}
    return student.eval()


def partly_fresh(teacher: nn.Module, blocks: int, seed: int = 0) -> nn.Module:
    """A copy of the teacher whose last `blocks` blocks, norm and head are re-initialised."""
    total = _depth(teacher)
    if not 0 <= blocks <= total:
        raise InputError(f"fresh_blocks must lie between 0 and the teacher's {total}, got {blocks}")
    student: Any = copy.deepcopy(unwrapped(teacher))
    parts = [*list(student.blocks)[total - blocks :], student.norm, student.fc_norm, student.head]
    with _seeded(seed), torch.no_grad():
        for part in [*parts, *([student.head_dist] if hasattr(student, "head_dist") else [])]:
            _reinitialise(part)
    return student.eval()


def _depth(model: Any) -> int:
    blocks = getattr(unwrapped(model), "blocks", None)
    if blocks is None:
        raise InputError(f"{type(model).__name__} has no blocks to re-initialise: take the student 'small' or a timm architecture")
    return len(blocks)


def _reinitialise(part: nn.Module) -> None:
    """timm's initial weights: linear layers truncated normal with standard deviation 0.02, norms and layer scales as when made."""
    module: Any
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters") and not list(module.children()):
            module.reset_parameters()


def _untrained(name: str, teacher: nn.Module) -> nn.Module:
    """A timm architecture with random weights in the teacher's sizes."""
    import timm

    if not timm.is_model(name):
        return load_model(name)  # a folder, or an error that suggests a name
    vit, _ = read_model(teacher)
    options: dict[str, Any] = {"num_classes": vit.num_classes, "in_chans": vit.channels}
    try:
        student: Any = timm.create_model(name, **options, img_size=vit.image_size)
    except TypeError:  # convolutional networks take any size
        student = timm.create_model(name, **options)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"the student {name} cannot take images of {vit.image_size}: {error}") from error
    cfg = student.pretrained_cfg
    student.pretrained_cfg = {"architecture": cfg.get("architecture", name), "mean": vit.mean, "std": vit.std, "flip": vit.flip, **vit.view.cfg()}
    return student.eval()
