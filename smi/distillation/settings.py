"""The settings of a distillation: optimisers as presets, everything checked before anything is made."""

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from ..errors import InputError


@dataclass(frozen=True)
class Settings:
    """How a student is trained; the defaults are the published ones where a paper states them."""

    optimiser: str = "sgd"  # or "adamw"
    lr: float = 0.1
    momentum: float = 0.9  # of SGD; AdamW's betas are (0.9, 0.99)
    weight_decay: float = 1e-4
    warmup: float = 0.0  # fraction of the steps over which the rate rises
    cosine: bool = False  # whether it then falls to zero
    clip: float | None = None  # largest norm of the gradient; None: no clipping
    temperature: float = 20.0
    steps: int = 2000
    batch_size: int = 128
    head_only: bool = False  # train the classifier alone (linear probe)
    roll: int | None = None  # pixels; None: an eighth of the shorter side
    flip: bool | None = None  # None: the teacher's own
    patch_dropout: float = 0.0  # largest fraction of an image's patches that a step leaves out, where both models read patches; drawn
    holdout: float = 0.1  # fraction of the images that the student is measured on and never trained on
    eval_every: int = 100  # steps
    patience: int | None = None  # evaluations without a better one before the run ends
    refresh_every: int | None = None  # steps; None: the images are made once
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        up = min(1.0, (step + 1) / (self.warmup * self.steps)) if self.warmup else 1.0
        return self.lr * up * (0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.cosine else 1.0)


PRESETS = {
    "published": Settings(),
    "adamw": Settings("adamw", lr=1e-3, weight_decay=0.05, warmup=0.05, cosine=True, clip=1.0, patch_dropout=0.9),
}


def make_settings(preset: str, options: dict) -> Settings:
    """A preset with its options replaced. Raises InputError for an unknown preset or option and for values that make no sense."""
    if preset not in PRESETS:
        raise InputError(f"unknown preset '{preset}': it must be {' or '.join(PRESETS)}")
    unknown = sorted(options.keys() - asdict(PRESETS[preset]).keys())
    if unknown:
        raise InputError(f"distill does not take {', '.join(unknown)}")
    made = replace(PRESETS[preset], **options)
    for name in ("steps", "batch_size", "eval_every", "patience", "refresh_every"):
        value = getattr(made, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name} must be a whole number of at least 1, got {value}")
    if not (isinstance(made.seed, int) and made.seed >= 0):
        raise InputError(f"seed must be a whole number of at least 0, got {made.seed}")
    for name in ("lr", "temperature", "clip"):
        value = getattr(made, name)
        if not (name == "clip" and value is None or 0 < value < math.inf):
            raise InputError(f"{name} must be positive, got {value}")
    if not 0 <= made.weight_decay < math.inf:
        raise InputError(f"weight_decay must be at least 0, got {made.weight_decay}")
    for name in ("holdout", "patch_dropout", "warmup", "momentum"):
        if not 0 <= getattr(made, name) < 1:
            raise InputError(f"{name} must lie from 0 up to 1, got {getattr(made, name)}")
    if made.roll is not None and made.roll < 0:
        raise InputError(f"roll must be at least 0 pixels, got {made.roll}")
    if made.optimiser not in ("sgd", "adamw"):
        raise InputError(f"unknown optimiser '{made.optimiser}': it must be sgd or adamw")
    return made


def make_optimiser(student: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimiser of the weights that learn; with AdamW, vectors and single tokens do not decay."""
    trained = [p for p in student.parameters() if p.requires_grad]
    if settings.optimiser == "sgd":
        return torch.optim.SGD(trained, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    matrices = [p for p in trained if p.ndim > 1 and p.shape[0] > 1]
    chosen = set(map(id, matrices))
    vectors = [p for p in trained if id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr, betas=(0.9, 0.99), fused=True)


def freeze_trunk(student: nn.Module) -> None:
    """Leave only the classifier to learn. Raises InputError where timm does not name it."""
    classifier = getattr(student, "get_classifier", lambda: None)()
    heads = [head for head in (classifier if isinstance(classifier, tuple) else (classifier,)) if isinstance(head, nn.Module)]
    if not any(True for head in heads for _ in head.parameters()):
        raise InputError(f"{type(student).__name__} names no classifier (get_classifier) whose weights could be trained alone")
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for head in heads:
        for parameter in head.parameters():
            parameter.requires_grad_(True)
