"""From settings to a run: each setting checked, None replaced by what it stands for, everything that is drawn drawn from the seed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Fused
from ..errors import InputError
from ..models.description import ViT
from ..models.levels import Model, read_model
from ..models.module import Classifier
from ..models.proof import refuse_nan
from ..plain import shown, usable_device, whole
from ..random_streams import generator
from . import augmentation, importance, psaq
from .losses import TV_WEIGHT, Loss, default_losses, needs_attention_outputs
from .memory_estimate import check_memory, chunk_of
from .run import Run, provenance_of
from .schedules import METHODS, Schedule, make_schedule
from .settings import PRESETS, Preset, Settings

DTYPES = {"fused": ("auto", "float32", "bfloat16", "float16"), "reference": ("auto", "float32", "float64")}  # by engine
SPARSE = ("smi", "pri")  # methods whose patches leave


def prepare(model: nn.Module, settings: Settings) -> Run:
    """Everything that decides the images. Raises InputError for a setting that makes no sense, alone or for this model, and RunError where memory
    does not suffice."""
    preset = PRESETS.get(settings.method or "", Preset())
    settings = _completed(settings, preset)
    whole(min(preset.iterations, 1))("iterations", settings.iterations)
    losses = _losses(settings)
    vit, why = read_model(model, mean=settings.mean, std=settings.std, flip=settings.flip, image_size=settings.image_size)
    refuse_nan(model)
    settings = replace(settings, engine=_module_engine(settings, vit, losses, why) if isinstance(vit, Classifier) else _engine(settings, losses))
    double = settings.dtype == "float64"
    vit = vit.to(_device(model, settings.device), torch.float64 if double else torch.float32, copy=True)  # the model's own may change between batches
    settings = replace(settings, init=settings.init.detach().clone() if isinstance(settings.init, Tensor) else settings.init)
    if isinstance(vit, Classifier) and (settings.method in SPARSE or getattr(settings.schedule, "events", None)):
        what = f"method '{settings.method}'" if settings.method else "this schedule"
        raise InputError(f"{what} needs a model that takes a subset of the patches, and {why}; method 'dense' takes it as it is")
    schedule = _schedule(settings, vit)
    trajectories = -(-settings.num_images // schedule.images_per_trajectory)
    _check_init(settings.init, (trajectories, vit.channels, *vit.image_size))
    labels = _labels(settings.labels, trajectories, vit.num_classes, settings.seed)
    table = _augmentation(settings, preset, schedule, vit)
    ranking = importance.resolve(settings.importance)
    fused = None
    if isinstance(vit, ViT) and settings.engine == "fused":
        fused = Fused(vit, settings.dtype, settings.recompute)  # last: it may compile and packs the weights
    run = Run(
        settings=replace(
            settings,
            method=settings.method or "custom",
            batch_size=min(settings.batch_size, trajectories),
            flip=vit.flip,
            losses=losses,
            dtype=str(fused.dtype if fused else vit.dtype).removeprefix("torch."),
            device=str(vit.device),
        ),
        vit=vit,
        schedule=schedule,
        labels=labels,
        table=table,
        losses=losses,
        importance=ranking,
        fused=fused,
    )
    run.provenance.update(provenance_of(run))
    if settings.max_memory is not None:
        run.chunk = _chunk(run, settings.max_memory)
    elif schedule.iterations and isinstance(vit, ViT):  # what another model takes is known when it has run
        check_memory(vit, schedule, run.batch_size, fused.mode if fused else None)
    return run


def _completed(settings: Settings, preset: Preset) -> Settings:
    """With the method's own where a setting is None."""
    iterations, losses, tv_weight = settings.iterations, settings.losses, settings.tv_weight
    if iterations is None:
        iterations = preset.iterations if settings.schedule is None else getattr(settings.schedule, "iterations", Preset.iterations)
    if losses is not None and not len(losses):
        raise InputError("losses must hold at least one function, or be None for the method's own")
    losses = preset.losses if losses is None else losses
    if losses != "default" and tv_weight is not None:
        if settings.losses is None:
            raise InputError(f"tv_weight belongs to the default loss: method '{settings.method}' brings its own total variation")
        raise InputError("pass losses or tv_weight, not both: losses bring their own total variation")
    if losses == "default" and tv_weight is None:
        tv_weight = TV_WEIGHT
    lr, betas = preset.lr if settings.lr is None else settings.lr, preset.betas if settings.betas is None else settings.betas
    return replace(settings, iterations=iterations, losses=losses, tv_weight=tv_weight, lr=lr, betas=betas)


def _check_init(init: Tensor | None, shape: tuple[int, ...]) -> None:
    if init is not None and (not isinstance(init, Tensor) or tuple(init.shape) != shape):
        given = list(getattr(init, "shape", [])) or type(init).__name__
        raise InputError(f"init must be a tensor {list(shape)}, one image per trajectory, got {given}")


def _device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """The device to run on; raises InputError where it is not to be had."""
    if device is None:
        return torch.device("cuda") if torch.cuda.is_available() else next(model.parameters()).device
    return usable_device(device)


def _engine(settings: Settings, losses: Sequence[Loss]) -> str:
    """The engine that is asked for; None is the fused one where it can do what is asked, the reference where it cannot."""
    name, dtype, taps = settings.engine, settings.dtype, any(map(needs_attention_outputs, losses))
    if name is None:
        name = "reference" if taps or dtype == "float64" else "fused"
    if name not in DTYPES:
        raise InputError(f"unknown engine '{name}': it must be {' or '.join(DTYPES)}")
    if dtype not in DTYPES[name]:
        why = ", which the loss needs" if taps and settings.engine is None else ""
        *others, last = DTYPES[name]
        raise InputError(f"dtype '{dtype}' is not supported by the {name} engine{why}: it must be {', '.join(others)} or {last}")
    if name == "fused" and taps:
        raise InputError("a loss needs the attention outputs of every block, which only engine='reference' keeps (--engine reference)")
    if name != "fused" and settings.recompute:
        raise InputError("recompute needs the fused engine: autograd decides what the reference saves")
    return name


def _module_engine(settings: Settings, vit: Classifier, losses: Sequence[Loss], why: str) -> str:
    """The name in the provenance; raises InputError for what only the engines of a ViT can do."""
    if settings.engine is not None:
        raise InputError(f"engine '{settings.engine}' cannot compute it, {why}: leave engine out, and it runs by its own modules")
    if settings.dtype not in DTYPES["reference"]:
        raise InputError(f"dtype '{settings.dtype}' needs the fused engine: {vit.name} runs its own modules, in float32 or float64")
    if any(map(needs_attention_outputs, losses)):
        raise InputError(f"a loss needs the attention outputs of every block, which {vit.name} does not give: take losses='default'")
    if settings.recompute:
        raise InputError(f"recompute needs the fused engine: autograd decides what {vit.name} saves")
    return "module"


def _chunk(run: Run, limit: float) -> int:
    if run.fused is None or isinstance(run.vit, Classifier):
        raise InputError("max_memory needs the fused engine, which can run a batch in parts")
    return chunk_of(run.vit, run.schedule, run.batch_size, limit, run.fused.mode)


def _schedule(settings: Settings, vit: Model) -> Schedule:
    method, schedule, iterations = settings.method, settings.schedule, settings.iterations
    options = {"prune_at": settings.prune_at, "prune_ratio": settings.prune_ratio, "division": settings.division}
    if method is None and schedule is None:
        raise InputError(f"name a method, {', '.join(METHODS)}, or pass a schedule")
    if schedule is not None and (method is not None or any(value is not None for value in options.values())):
        raise InputError("pass a schedule, or a method with its options, not both")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise InputError(f"schedule must be a smi.Schedule, got {type(schedule).__name__}")
    made = schedule or make_schedule(method, vit.num_patches, iterations, **options)  # type: ignore[arg-type]  # neither is None: completed
    if (made.num_patches, made.iterations) != (vit.num_patches, iterations):
        asked = f"the model has {vit.num_patches} and iterations is {iterations}"
        raise InputError(f"the schedule is for {made.num_patches} patches and {made.iterations} iterations, but {asked}")
    return made


def _losses(settings: Settings) -> list[Loss]:
    losses = settings.losses
    if losses == "default":
        return default_losses(settings.tv_weight)  # type: ignore[arg-type]  # completed
    if isinstance(losses, str):
        if losses != "psaq":
            raise InputError(f"unknown losses '{losses}': they must be default or psaq, or functions of (images, logits, labels)")
        return psaq.losses(generator(settings.seed, "psaq"))
    return list(losses or ())


def _augmentation(settings: Settings, preset: Preset, schedule: Schedule, vit: Model) -> Tensor:
    """The table int32 [iterations, 3] of a run, still around events."""
    if settings.augmentation is None:
        table = preset.draw(schedule.iterations, vit.image_size, generator(settings.seed, "augmentation"), settings.jitter, vit.flip)
    else:
        table = augmentation.from_rows(settings.augmentation, schedule.iterations)
    return augmentation.hold_still(table, schedule.still_iterations())


def _labels(labels: Any, trajectories: int, classes: int, seed: int) -> Tensor:
    if labels is None:
        return torch.randint(classes, (trajectories,), generator=generator(seed, "labels"))
    if not len(labels):
        raise InputError("labels must name at least one class, or be None to draw them")
    if not 0 <= min(labels) <= max(labels) < classes:
        unknown = shown(sorted({label for label in labels if not 0 <= label < classes}))
        raise InputError(f"labels must be whole numbers from 0 to {classes - 1}, because the model has {classes} classes, got {unknown}")
    return torch.tensor(labels)[torch.arange(trajectories) % len(labels)]
