"""The settings of an inversion: checked, completed with the published defaults, and everything random drawn from the seed."""

import datetime
import platform
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Fused
from ..errors import InputError
from ..kernels.dispatch import backend
from ..models.vit import ViT, describe
from ..random_streams import generator
from ..version import __version__
from . import augmentation as augment
from . import importance as ranking
from . import psaq
from .losses import TV_WEIGHT, Loss, default_losses, needs_attention_outputs
from .memory_estimate import check_memory, chunk_of
from .schedules import PUBLISHED_ITERATIONS, Schedule, make_schedule
from .step import UPDATES

BATCH_SIZE = 128  # trajectories optimised together, the largest batch of the papers
LEARNING_RATE = 0.25
BETAS = (0.5, 0.99)
MOST = 10**9  # of anything counted


@dataclass(frozen=True)
class Preset:
    """What a method brings beside its schedule, as published."""

    iterations: int = PUBLISHED_ITERATIONS
    losses: str = "default"
    lr: float = LEARNING_RATE
    betas: tuple[float, float] = BETAS
    draw: Callable[..., Tensor] = augment.draw  # the augmentation


PRESETS = {
    "psaq": Preset(psaq.ITERATIONS, "psaq", psaq.LEARNING_RATE, psaq.BETAS, psaq.draw_augmentation),
    "gaussian": Preset(iterations=0),
}


@dataclass(frozen=True, eq=False)
class Iteration:
    """What `on_iteration` is told after each update."""

    batch: int  # 0-based
    batches: int
    iteration: int  # 0-based, of this batch
    iterations: int
    value: float | Tensor  # the loss; reading it as `loss` waits for the device
    active: int  # patches of each image that took part
    seconds: float  # since the run began
    images: Tensor  # [B, C, H, W], normalised pixels, live: clone to keep
    index: Tensor  # int64 [B, active]
    labels: Tensor  # int64 [B]

    @property
    def loss(self) -> float:
        return float(self.value)


@dataclass(eq=False)
class Run:
    """Everything that decides the images of a run."""

    vit: ViT
    schedule: Schedule
    labels: Tensor  # int64 [trajectories]
    table: Tensor  # int32 [iterations, 3], (dy, dx, flip)
    losses: Sequence[Loss]
    importance: Callable[[ranking.Snapshot], Tensor]
    num_images: int
    batch_size: int
    seed: int
    init: Tensor | None
    lr: float
    betas: tuple[float, float]
    fused: Fused | None  # the engine; None for the reference
    update: str  # which pixels move: "active" or "all"
    chunk: int | None = None  # trajectories whose passes run together, None for all of a batch
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return self.vit.embed.weight.dtype

    def generator(self, purpose: str, trajectory: int = 0) -> torch.Generator:
        return generator(self.seed, purpose, trajectory)


def prepare(
    model: nn.Module,
    *,
    method: str | None = None,
    num_images: int,
    labels: Sequence[int] | Tensor | None = None,
    iterations: int | None = None,
    batch_size: int = BATCH_SIZE,
    schedule: Schedule | None = None,
    prune_at: Sequence[int] | None = None,
    prune_ratio: float | None = None,
    division: int | None = None,
    importance: str | Callable[[ranking.Snapshot], Tensor] = "cls_attention",
    losses: str | Sequence[Loss] | None = None,
    tv_weight: float | None = None,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    engine: str | None = None,
    update: str = "active",
    max_memory: float | None = None,
    recompute: bool = False,
    init: Tensor | None = None,
    augmentation: Sequence[tuple[int, int, bool]] | None = None,
    jitter: int | None = None,
    flip: bool | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    on_iteration: Callable[[Iteration], None] | None = None,
) -> tuple[Run, Callable[[Iteration], None] | None]:
    """Check every setting and settle what is drawn; the settings are those of `invert_batches`."""
    preset = PRESETS.get(method, Preset())
    lr, betas = preset.lr if lr is None else lr, preset.betas if betas is None else betas
    losses = preset.losses if losses is None and preset.losses != "default" else losses
    if iterations is None:
        iterations = preset.iterations if schedule is None else getattr(schedule, "iterations", PUBLISHED_ITERATIONS)
    whole = {"num_images": (num_images, 1), "batch_size": (batch_size, 1), "seed": (seed, 0), "iterations": (iterations, min(preset.iterations, 1))}
    _check_numbers(whole, jitter, lr, betas, tv_weight)
    if update not in UPDATES:
        raise InputError(f"update must be {' or '.join(UPDATES)}, got '{update}'")
    if losses is not None and not losses:
        raise InputError("losses must hold at least one function, or be None for the published loss")
    if losses not in (None, "default") and tv_weight is not None:
        raise InputError("pass losses or tv_weight, not both: a list of losses brings its own total variation")
    losses_used = _losses(losses, tv_weight, seed)
    engine = _engine(engine, dtype, losses_used)
    if recompute and engine != "fused":
        raise InputError("recompute needs the fused engine: the reference keeps what autograd does")
    vit = describe(model, mean=mean, std=std, flip=flip).to(_device(model, device), torch.float64 if dtype == "float64" else torch.float32)
    _refuse_nan(model)
    options = {"prune_at": prune_at, "prune_ratio": prune_ratio, "division": division}
    schedule = _schedule(method, vit, iterations, schedule, options)
    trajectories = -(-num_images // schedule.images_per_trajectory)
    if augmentation is None:
        table = preset.draw(schedule.iterations, vit.image_size, generator(seed, "augmentation"), jitter, vit.flip)
    else:
        table = augment.from_rows(augmentation, schedule.iterations)
    _check_init(init, (trajectories, vit.channels, *vit.image_size))
    run = Run(
        vit=vit,
        schedule=schedule,
        labels=_labels(labels, trajectories, vit.num_classes, seed),
        table=augment.hold_still(table, schedule.still_iterations()),
        losses=losses_used,
        importance=ranking.resolve(importance),
        num_images=num_images,
        batch_size=min(batch_size, trajectories),
        seed=seed,
        init=init,
        lr=lr,
        betas=betas,
        fused=Fused(vit, dtype, recompute) if engine == "fused" else None,
        update=update,
    )
    run.provenance.update(_provenance(run, method, labels, importance, losses, tv_weight, jitter, augmentation))
    if max_memory is not None:
        run.chunk = _chunk(run, max_memory)
    elif iterations:
        check_memory(vit, schedule, run.batch_size, run.fused and run.fused.mode)
    return run, on_iteration


def _check_numbers(whole: dict[str, tuple[int, int]], jitter, lr: float, betas: tuple[float, float], tv_weight: float | None) -> None:
    """Raise InputError for a number out of its range; whole: name to value and the least that it may be."""
    for name, (value, least) in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
            raise InputError(f"{name} must be a whole number from {least} to {MOST}, got {value}")
    if jitter is not None and not (isinstance(jitter, int) and jitter >= 0):
        raise InputError(f"jitter must be a whole number of pixels of at least 0, got {jitter}")
    if not lr > 0 or not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"lr must be positive and both betas from 0 up to 1, got {lr} and {betas}")
    if tv_weight is not None and not 0 <= tv_weight < float("inf"):
        raise InputError(f"tv_weight must be a finite number of at least 0, got {tv_weight}")


def _check_init(init: Tensor | None, shape: tuple[int, ...]) -> None:
    if init is not None and (not isinstance(init, Tensor) or tuple(init.shape) != shape):
        given = list(getattr(init, "shape", [])) or type(init).__name__
        raise InputError(f"init must be a tensor {list(shape)}, one image per trajectory, got {given}")


def _device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """The device to run on; raises InputError where it is not to be had."""
    if device is None:
        return torch.device("cuda") if torch.cuda.is_available() else next(model.parameters()).device
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError("neither a CPU nor a CUDA GPU")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device '{device}' cannot be used here: try 'cpu'{' or cuda' if torch.cuda.is_available() else ''}") from error
    return chosen


def _engine(name: str | None, dtype: str, losses: Sequence[Loss]) -> str:
    """The engine that is asked for; None is the fused one where it can do what is asked, the reference where it cannot."""
    allowed = {"fused": ("auto", "float32", "bfloat16", "float16"), "reference": ("auto", "float32", "float64")}
    taps = any(map(needs_attention_outputs, losses))
    if name is None:
        name = "reference" if taps or dtype == "float64" else "fused"
    if name not in allowed:
        raise InputError(f"engine '{name}' is not known: it must be {' or '.join(allowed)}")
    if dtype not in allowed[name]:
        raise InputError(f"dtype '{dtype}' is not supported by the {name} engine: it must be {', '.join(allowed[name])}")
    if name == "fused" and taps:
        raise InputError("a loss needs the attention outputs of every block, which only engine='reference' keeps")
    return name


def _chunk(run: Run, limit: float) -> int:
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < float("inf"):
        raise InputError(f"max_memory must be a positive number of GiB, got {limit}")
    if run.fused is None:
        raise InputError("max_memory needs the fused engine, which can run a batch in parts")
    return chunk_of(run.vit, run.schedule, run.batch_size, limit, run.fused.mode)


def _refuse_nan(model: nn.Module) -> None:
    bad = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if bad:
        raise InputError(f"the model's weights hold NaN or infinity, first in {bad[0]} ({len(bad)} of its tensors): check the checkpoint")


def _schedule(method: str | None, vit: ViT, iterations: int, schedule: Schedule | None, options: dict) -> Schedule:
    if method is None and schedule is None:
        raise InputError("name a method, dense, smi, pri, psaq or gaussian, or pass a schedule")
    if schedule is not None and (method is not None or any(value is not None for value in options.values())):
        raise InputError("pass a schedule, or a method with its options, not both")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise InputError(f"schedule must be a smi.Schedule, got {type(schedule).__name__}")
    made = make_schedule(method, vit.num_patches, iterations, **options) if schedule is None else schedule
    if (made.num_patches, made.iterations) != (vit.num_patches, iterations):
        asked = f"the model has {vit.num_patches} and iterations is {iterations}"
        raise InputError(f"the schedule is for {made.num_patches} patches and {made.iterations} iterations, but {asked}")
    return made


def _losses(losses: str | Sequence[Loss] | None, tv_weight: float | None, seed: int) -> list[Loss]:
    if losses is None or losses == "default":
        return default_losses(TV_WEIGHT if tv_weight is None else tv_weight)
    if isinstance(losses, str):
        if losses != "psaq":
            raise InputError(f"unknown losses '{losses}': they must be default or psaq, or functions of (images, logits, labels)")
        return psaq.losses(generator(seed, "psaq"))
    return list(losses)


def _labels(labels: Sequence[int] | Tensor | None, trajectories: int, classes: int, seed: int) -> Tensor:
    if labels is None:
        return torch.randint(classes, (trajectories,), generator=generator(seed, "labels"))
    try:
        given = torch.as_tensor(labels).flatten().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"labels must be whole numbers from 0 to {classes - 1}, got {labels!r:.100}") from error
    if not len(given):
        raise InputError("labels must name at least one class, or be None to draw them")
    if given.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64) or not 0 <= int(given.min()) <= int(given.max()) < classes:
        raise InputError(
            f"labels must be whole numbers from 0 to {classes - 1}, the model has {classes} classes; got {sorted(set(given.tolist()))[:10]}"
        )
    return given.long()[torch.arange(trajectories) % len(given)]


def _provenance(run: Run, method, labels, importance, losses, tv_weight, jitter, augmentation) -> dict[str, Any]:
    """Every setting of the run as JSON."""
    import timm

    names = [getattr(loss, "__qualname__", repr(loss)) for loss in run.losses]
    return {
        "method": method or "custom",
        "model": run.vit.name,
        "weights_sha256": run.vit.weight_hash(),
        "num_images": run.num_images,
        "batch_size": run.batch_size,
        "seed": run.seed,
        "iterations": run.schedule.iterations,
        "schedule": [asdict(event) for event in run.schedule.events],
        "importance": importance if isinstance(importance, str) else getattr(importance, "__qualname__", repr(importance)),
        "losses": names,
        "tv_weight": (TV_WEIGHT if tv_weight is None else tv_weight) if losses in (None, "default") else None,
        "lr": run.lr,
        "betas": list(run.betas),
        "jitter": jitter,
        "flip": run.vit.flip,
        "labels": "drawn" if labels is None else "given",
        "init": "noise" if run.init is None else "given",
        "augmentation": "drawn" if augmentation is None else "given",
        "dtype": str(run.fused.dtype if run.fused else run.dtype).removeprefix("torch."),
        "device": str(run.vit.device),
        "engine": "fused" if run.fused else "reference",
        "update": run.update,
        "backend": backend(),
        **({"operations": run.fused.describe()["versions"]} if run.fused else {}),
        "run": uuid.uuid4().hex,
        "versions": {"smi": __version__, "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
