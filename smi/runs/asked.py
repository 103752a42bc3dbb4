"""What decides the images of a run, as JSON: by it a folder's run is told from another. Tensors are compared by their hashes."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from ..inversion.importance import IMPORTANCES
from ..inversion.losses import cross_entropy, total_variation
from ..inversion.run import Run
from ..inversion.settings import InvertSettings, Settings

UNNAMED = "a function without a label"  # in place of what cannot be compared
COUNTED = ("num_images", "batch_size", "device")  # more images extend a run; the last batch may be short; bits are those of a class of machine


def asked_of(run: Run, given: InvertSettings) -> dict[str, Any]:
    """What a prepared run was asked. given: its settings as they were before they were completed."""
    recorded = {each.name: each.metadata["recorded"] for each in fields(Settings) if each.metadata["recorded"] and each.name not in COUNTED}
    values = {name: record(getattr(run.settings, name)) for name, record in recorded.items()}
    vit, label = run.vit, given.label
    return {
        **values,
        "batch_size": given.batch_size,
        "importance": _function(given.importance, label),
        "losses": given.losses if given.losses is None or isinstance(given.losses, str) else [_function(loss, label) for loss in given.losses],
        "labels": "drawn" if given.labels is None else _hash(torch.tensor(given.labels)),
        "init": "noise" if given.init is None else _hash(given.init),
        "augmentation": "drawn" if given.augmentation is None else _hash(run.table),
        "schedule": [asdict(event) for event in run.schedule.events],
        "mean": list(vit.mean),
        "std": list(vit.std),
        "weights": vit.weight_hash(),
        "architecture": vit.structure_hash(),
        "label": label,
    }


def _function(value: str | Callable, label: str | None) -> str:
    """A name, or the name of a function of ours; the user's own are what their label says."""
    if isinstance(value, str):
        return value
    for name, function in {**IMPORTANCES, "cross_entropy": cross_entropy}.items():
        if value is function:
            return name
    if getattr(value, "__code__", None) is _TOTAL_VARIATION:
        return f"total variation {value.tv_weight!r}"  # type: ignore[attr-defined]
    return UNNAMED if label is None else f"function of {label!r}"


_TOTAL_VARIATION = total_variation().__code__


def _hash(tensor: Tensor) -> str:
    held = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{held.dtype} {tuple(held.shape)}".encode())
    digest.update(held.view(-1).view(torch.uint8).numpy().tobytes() if held.numel() else b"")
    return f"sha256:{digest.hexdigest()}"
