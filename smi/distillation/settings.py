"""The settings of a distillation: optimisers as presets, everything checked before anything is made."""

import math
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import nn

from ..errors import InputError
from ..plain import Take, flag, one_of, real, shown, whole

LARGEST = 1e30  # of what multiplies float32 tensors
POSITIVE = real("a positive number up to 1e30", lambda value: 0 < value <= LARGEST)
PART = real("a number from 0 up to 1", lambda value: 0 <= value < 1)
TAKES: dict[str, Take] = {
    **dict.fromkeys(("steps", "batch_size", "eval_every", "patience", "refresh_every"), whole(1)),
    **dict.fromkeys(("lr", "temperature", "clip"), POSITIVE),
    **dict.fromkeys(("holdout", "patch_dropout", "warmup", "momentum"), PART),
    **dict.fromkeys(("cosine", "head_only", "flip"), flag),
    "weight_decay": real("a number from 0 to 1e30", lambda value: 0 <= value <= LARGEST),
    "roll": whole(),
    "seed": whole(0, 2**63 - 1),
    "optimiser": one_of(("sgd", "adamw")),
}


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

    def __post_init__(self) -> None:
        """Make plain numbers of all; raises InputError for values that make no sense."""
        for each in fields(self):
            value = getattr(self, each.name)
            if not (value is None and each.default is None):
                object.__setattr__(self, each.name, TAKES[each.name](each.name, value))

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
    if not isinstance(preset, str) or preset not in PRESETS:
        raise InputError(f"unknown preset '{shown(preset)}': it must be {' or '.join(PRESETS)}")
    unknown = sorted(options.keys() - asdict(PRESETS[preset]).keys())
    if unknown:
        raise InputError(f"distill does not take {', '.join(unknown)}")
    return replace(PRESETS[preset], **options)


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
