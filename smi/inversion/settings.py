"""The settings of an inversion, each stated once: name, type, default, meaning, and which values it takes.

They become plain numbers when they are made: numbers of NumPy and torch are welcome, NaN and infinity are refused.

The signature and the docstring of `smi.invert`, the help of the command line and the provenance of the images follow from these fields.
"""

import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..images.sparse_images import SparseImages
from ..plain import MEANS, MOST, STDS, Take, dense, flag, holds_numbers, items, one_of, real, scalar, several, shown, whole, word
from . import augmentation, psaq
from .importance import Snapshot
from .losses import TV_WEIGHT, Loss
from .progress import Iteration
from .schedules import DIVISION, PUBLISHED_ITERATIONS, SMI_PRUNE_RATIO, Schedule

P = ParamSpec("P")
R = TypeVar("R")


UPDATES = ("active", "all")


@dataclass(frozen=True)
class Preset:
    """What a method brings beside its schedule, as published."""

    iterations: int = PUBLISHED_ITERATIONS
    losses: str = "default"
    lr: float = 0.25
    betas: tuple[float, float] = (0.5, 0.99)
    draw: Callable[..., Tensor] = augmentation.draw


PRESETS = {
    "psaq": Preset(psaq.ITERATIONS, "psaq", psaq.LEARNING_RATE, psaq.BETAS, psaq.draw_augmentation),
    "gaussian": Preset(iterations=0),
}


def as_is(value: Any) -> Any:
    """A setting's value in the provenance, where it is JSON already."""
    return list(value) if isinstance(value, tuple) else value


def named(value: Any) -> Any:
    """Names of functions in the provenance."""
    if isinstance(value, list | tuple):
        return [named(part) for part in value]
    name = value if isinstance(value, str) else getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else shown(value)


def given_or(otherwise: str) -> Callable[[Any], str]:
    """Provenance of a value too large to record: whether it was given."""
    return lambda value: otherwise if value is None else "given"


def setting(
    default: Any, meaning: str, take: Take | None = None, *, unset: str = "", in_python: str = "", recorded: Callable[[Any], Any] | None = as_is
) -> Any:
    """A field of `Settings`. take: what it takes and makes of it; None passes where it is the default. unset: what None stands for. in_python: what a
    caller in Python can pass besides. recorded: its value in the provenance, None where it does not decide the images or the provenance states it
    otherwise."""
    return field(default=default, metadata={"meaning": meaning, "take": take, "unset": unset, "in_python": in_python, "recorded": recorded})


POSITIVE = real("positive and finite", lambda value: value > 0)


def _classes(name: str, value: Any) -> tuple[int, ...]:
    """Whole numbers, of one or of a nest of sequences; that they are classes of the model is checked with the model."""
    flat = value.flatten() if isinstance(value, np.ndarray) or (isinstance(value, Tensor) and holds_numbers(value)) else value
    try:
        return several(whole(-sys.maxsize, sys.maxsize))(name, [flat] if isinstance(flat, int | np.integer) else flat)
    except InputError as error:
        raise InputError(f"{name} must be whole numbers, the classes to invert, got {shown(value)}") from error


def _pixels(name: str, value: Any) -> Tensor:
    """A tensor of finite numbers."""
    held = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) and value.dtype.kind in "fiu" else value
    if not isinstance(held, Tensor) or held.is_complex() or held.dtype == torch.bool:
        raise InputError(f"{name} must be a tensor of pixels [trajectories, C, H, W], got {type(value).__name__}")
    held = held.detach()
    if not torch.isfinite(dense(name, held)).all():
        raise InputError(f"{name} must hold finite numbers: it holds NaN or infinity")
    return held if held.dtype.is_floating_point else held.float()


def _offsets(name: str, value: Any) -> tuple[tuple[int, int, bool], ...]:
    """Rows of (dy, dx, flip)."""

    def row(name: str, given: Any) -> tuple[int, int, bool]:
        dy, dx, mirrored = several(lambda name, part: scalar(part), 3)(name, given)
        pixels = whole(-MOST)
        return pixels(name, dy), pixels(name, dx), flag(name, mirrored)

    try:
        return several(row)(name, value)
    except InputError as error:
        raise InputError(f"each row of augmentation must be (dy, dx, flip) in whole pixels: {error}") from error


def _dtype(name: str, value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else word(name, value)


def _device(name: str, value: Any) -> str | torch.device:
    return value if isinstance(value, torch.device) else word(name, value)


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise InputError(f"{name} must be a path, got {type(value).__name__}")
    return Path(value)


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise InputError(f"{name} must be a function, got {type(value).__name__}")
    return value


def _name_or_callable(name: str, value: Any) -> Any:
    return value if callable(value) else word(name, value)


def _name_or_callables(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return str(value)
    given = None if callable(value) else items(value)
    if given is None:
        raise InputError(f"{name} must be a name or a sequence of functions of (images, logits, labels), got {type(value).__name__}")
    return tuple(_callable(f"each of {name}", each) for each in given)


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """What decides the images of a run, and how they are computed."""

    method: str | None = setting(
        None,
        "which strategy: dense (DeepInversion), smi (Sparse Model Inversion), pri (Patch Rebirth Inversion), psaq (PSAQ-ViT: dense, with its own "
        "loss, optimiser and jitter) or gaussian (noise, nothing optimised)",
        take=word,
    )
    num_images: int = setting(MISSING, "number of finished images", take=whole(1))
    labels: Sequence[int] | Tensor | None = setting(
        None, "classes to invert, one per trajectory, cycled", unset="drawn from the seed", recorded=given_or("drawn"), take=_classes
    )
    iterations: int | None = setting(
        None, "updates per batch", unset=f"as published: {PUBLISHED_ITERATIONS}, psaq {psaq.ITERATIONS}, gaussian none", take=whole()
    )
    batch_size: int = setting(128, "trajectories optimised together; pri makes several images of each", take=whole(1))
    schedule: Schedule | None = setting(None, "a smi.Schedule of your own, instead of a method", recorded=None)
    prune_at: Sequence[int] | None = setting(
        None, "iterations of the prune events (method smi)", unset="the published ones, scaled", recorded=None, take=several(whole())
    )
    prune_ratio: float | None = setting(
        None,
        "fraction of the active patches that each prune event drops (method smi)",
        unset=str(SMI_PRUNE_RATIO),
        recorded=None,
        take=real("a number between 0 and 1", lambda ratio: 0 < ratio < 1),
    )
    division: int | None = setting(None, "images per trajectory (method pri)", unset=str(DIVISION), recorded=None, take=whole(1))
    importance: str | Callable[[Snapshot], Tensor] = setting(
        "cls_attention",
        "how patches are ranked: cls_attention or random",
        in_python=", or a function of smi.importance.Snapshot that returns scores [B, n]",
        recorded=named,
        take=_name_or_callable,
    )
    losses: str | Sequence[Loss] | None = setting(
        None,
        "which terms: default (cross-entropy and total variation) or psaq (PSAQ-ViT's, with any method)",
        in_python=", or functions of (images, logits, labels) to be summed",
        unset="the method's own",
        recorded=named,
        take=_name_or_callables,
    )
    tv_weight: float | None = setting(
        None,
        "weight of the total variation in the default loss",
        unset=f"{TV_WEIGHT:g}",
        take=real("a finite number of at least 0", lambda weight: weight >= 0),
    )
    lr: float | None = setting(None, "learning rate of Adam", unset=f"{Preset.lr}, psaq {psaq.LEARNING_RATE}", take=POSITIVE)
    betas: tuple[float, float] | None = setting(
        None, "betas of Adam", unset=f"{Preset.betas}, psaq {psaq.BETAS}", take=several(real("from 0 up to 1", lambda beta: 0 <= beta < 1), 2)
    )
    init: Tensor | None = setting(
        None,
        "normalised pixels [trajectories, C, H, W] to start from",
        unset="Gaussian noise from the seed",
        recorded=given_or("noise"),
        take=_pixels,
    )
    augmentation: Sequence[tuple[int, int, bool]] | None = setting(
        None,
        "one (dy, dx, flip) per iteration, in pixels, the same for every batch; at an event and one iteration before it, (0, 0, False) is taken",
        unset="drawn from the seed",
        recorded=given_or("drawn"),
        take=_offsets,
    )
    jitter: int | None = setting(None, "largest offset of the augmentation, in pixels", unset="an eighth of each side", take=whole())
    flip: bool | None = setting(None, "whether mirror images keep their class", unset="as the model says, else yes", take=flag)
    mean: tuple[float, ...] | None = setting(
        None, "mean of the training images per channel, in [0, 1]", unset="the model's own", recorded=None, take=MEANS
    )
    std: tuple[float, ...] | None = setting(
        None, "standard deviation of the training images per channel", unset="the model's own", recorded=None, take=STDS
    )
    image_size: tuple[int, int] | None = setting(
        None,
        "height and width of the images in pixels, for a module that does not tell it",
        unset="the model's own",
        recorded=None,
        take=several(whole(1), 2),
    )
    seed: int = setting(0, "seed of everything that is drawn", take=whole(0, 2**63 - 1))
    engine: str | None = setting(
        None, "which engine: fused or reference", unset="fused, unless a loss or dtype float64 needs the reference", take=word
    )
    dtype: str = setting(
        "auto",
        "arithmetic of the model: auto (the faster one on the device); float32, bfloat16 or float16 (fused); float32 or float64 (reference)",
        take=_dtype,
    )
    update: str = setting(
        "active", "which pixels move: active (those of the active patches) or all (every pixel, as in published code)", take=one_of(UPDATES)
    )
    max_memory: float | None = setting(
        None,
        "limit in GiB beside the weights; a batch that needs more runs in parts (fused)",
        unset="no limit",
        recorded=None,
        take=real("a positive number of GiB", lambda size: size > 0),
    )
    recompute: bool = setting(
        False,
        "recompute the MLP's activations in the backward pass: 44 % less activation memory for 17 % more FLOPs (fused)",
        recorded=None,
        take=flag,
    )
    device: str | torch.device | None = setting(
        None, "where to run: cpu, cuda or cuda:N", unset="a GPU where there is one, else the model's device", take=_device
    )
    on_iteration: Callable[[Iteration], None] | None = setting(None, "called with a smi.Iteration after each update", recorded=None, take=_callable)

    def __post_init__(self) -> None:
        for each in fields(self):
            take, value = each.metadata["take"], getattr(self, each.name)
            if take is not None and not (value is None and each.default is None):
                object.__setattr__(self, each.name, take(each.name, value))


@dataclass(frozen=True, kw_only=True, eq=False)
class InvertSettings(Settings):
    """The same, and where the images go."""

    output: str | Path | None = setting(
        None,
        "folder for the images; every finished batch is written at once, and the same command goes on with a run that was stopped, or helps one that "
        "goes on",
        recorded=None,
        take=_path,
    )
    force: bool = setting(False, "replace what was written to the output folder before", recorded=None, take=flag)
    checkpoint_every: float = setting(
        60.0,
        "seconds between checkpoints within a batch, longer where they would take more than 2 % of the time; 0 for none",
        recorded=None,
        take=real("a number of seconds of at least 0", lambda seconds: seconds >= 0),
    )
    label: str | None = setting(
        None,
        "your name for what functions of your own compute: a run with such functions goes on only under the same name",
        recorded=None,
        take=word,
    )
    snapshots: int = setting(
        8, "snapshots of the first trajectory, kept in the output folder for smi report; 0 for none", recorded=None, take=whole()
    )
    progress: bool = setting(True, "show iteration, it/s, loss, active patches and time left on the terminal", recorded=None, take=flag)
    on_batch: Callable[[SparseImages], None] | None = setting(
        None, "called with each batch that this call finishes, once it is written", recorded=None, take=_callable
    )


def setting_named(name: str) -> Field:
    """The field of a setting."""
    return next(each for each in fields(InvertSettings) if each.name == name)


def by_keyword(kind: Callable[P, Settings]) -> Callable[[Callable[[nn.Module, Any], R]], Callable[Concatenate[nn.Module, P], R]]:
    """Turn function(model, settings) into function(model, **settings), with the signature of `kind` and its settings in the docstring."""
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in inspect.signature(kind).parameters.values()]

    def decorate(function: Callable[[nn.Module, Any], R]) -> Callable[Concatenate[nn.Module, P], R]:
        own = inspect.signature(function)
        signature = own.replace(parameters=[next(iter(own.parameters.values())), *parameters])

        @wraps(function)
        def call(model: nn.Module, *args: P.args, **settings: P.kwargs) -> R:
            try:
                signature.bind(model, *args, **settings)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(model, kind(*args, **settings))

        del call.__wrapped__  # help() and pdoc would show that one
        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("{settings}", _listed(kind))
        return call

    return decorate


def _listed(kind: Any) -> str:
    lines = []
    for each in fields(kind):
        about = each.metadata
        lines.append(f"- {each.name}: {about['meaning']}{about['in_python']}" + (f" (None: {about['unset']})." if about["unset"] else "."))
    return "\n".join(textwrap.fill(line, 120, subsequent_indent="  ") for line in lines)
