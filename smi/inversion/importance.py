"""How active patches are ranked at an event: functions of a `Snapshot` that return scores [B, n]; a user's own is as good."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What is known when patches are ranked: a forward pass without augmentation, B images with n active patches."""

    images: Tensor  # [B, C, H, W], normalised pixels
    index: Tensor  # int64 [B, n], row-major cells of the active patches, ascending
    labels: Tensor  # int64 [B]
    logits: Tensor  # [B, classes]
    attention: Tensor  # [B, n], attention that the CLS token pays to each active patch in the last block, mean over heads
    generators: Sequence[torch.Generator]  # on the CPU, one per image, seeded by run and trajectory


def cls_attention(snapshot: Snapshot) -> Tensor:
    """The published importance: attention of the CLS token in the last block, averaged over heads."""
    return snapshot.attention


def random(snapshot: Snapshot) -> Tensor:
    """Uniform scores, drawn per trajectory so that the batch size does not matter: the control that attention has to beat."""
    n = snapshot.index.shape[1]
    return torch.stack([torch.rand(n, generator=generator) for generator in snapshot.generators]).to(snapshot.attention)


IMPORTANCES: dict[str, Callable[[Snapshot], Tensor]] = {"cls_attention": cls_attention, "random": random}


def resolve(importance: str | Callable[[Snapshot], Tensor]) -> Callable[[Snapshot], Tensor]:
    """The function of that name, or the function itself."""
    if callable(importance):
        return importance
    if importance not in IMPORTANCES:
        raise InputError(f"unknown importance '{importance}': it must be {' or '.join(IMPORTANCES)}, or a function of smi.importance.Snapshot")
    return IMPORTANCES[importance]


def choose(scores: Tensor, count: int, highest: bool) -> tuple[Tensor, Tensor]:
    """Places of the `count` highest (or lowest) scores of each row, and of the others; each ascending, ties to the earlier place.

    scores: [B, n]. Returns int64 [B, count] and [B, n - count].
    """
    order = scores.argsort(dim=1, descending=highest, stable=True)
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values
