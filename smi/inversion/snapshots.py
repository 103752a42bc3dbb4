"""How one image came to be: a handful of snapshots of a run's first trajectory and the loss of its batch, kept beside the images to be looked at.

The buffers are made once, on the device, and read back when the batch is over: the loop neither waits nor grows.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, RunError
from ..files import read_tensors, replace_file
from .progress import Iteration
from .run import Run
from .schedules import Schedule

FILE = "progress.safetensors"
FORMAT = "smi.progress/1"
FIELDS = ("pixels", "index", "losses", "iterations", "loss_iterations", "label")
LOSSES = 200  # points of the loss curve at most


@dataclass(frozen=True, eq=False)
class Progress:
    """What was kept of one trajectory."""

    pixels: Tensor  # float32 [K, C, H, W], normalised, after the update of each iteration
    active: list[Tensor]  # int64 [n] each, row-major cells of the patches that were active, ascending
    iterations: list[int]  # 0-based, of the K snapshots
    losses: Tensor  # float32 [L], of the batch
    loss_iterations: list[int]
    label: int


def moments(schedule: Schedule, count: int) -> list[int]:
    """At most `count` iterations to look at: the first, the last, those that end with an event, and then the middle of the longest gap; where the
    events are more, as many of them, evenly chosen."""
    last = schedule.iterations - 1
    if last < 0 or count < 1:
        return []
    chosen = sorted({0, last, *(event.iteration - 1 for event in schedule.events)})
    if len(chosen) > count:
        return [chosen[i] for i in _evenly(len(chosen), count)]
    while len(chosen) < min(count, schedule.iterations):
        before, after = max(zip(chosen, chosen[1:], strict=False), key=lambda gap: gap[1] - gap[0])
        chosen = sorted([*chosen, (before + after) // 2])
    return chosen


def _evenly(total: int, count: int) -> list[int]:
    """`count` distinct places of `total`, the last among them, and the first where there are two."""
    return [total - 1] if count == 1 else [round(i * (total - 1) / (count - 1)) for i in range(count)]


class Recorder:
    """Called with every `Iteration` of a run, keeps `count` snapshots of its first trajectory; `save` when the first batch is over."""

    def __init__(self, run: Run, count: int):
        vit, schedule = run.vit, run.schedule
        self.run = run
        self.moments = {iteration: place for place, iteration in enumerate(moments(schedule, count))}
        points = _evenly(schedule.iterations, min(LOSSES, schedule.iterations)) if schedule.iterations else []
        self.loss_moments = {iteration: place for place, iteration in enumerate(points)}
        self.pixels = torch.zeros(len(self.moments), vit.channels, *vit.image_size, device=vit.device)
        self.index = torch.full((len(self.moments), vit.num_patches), -1, device=vit.device)  # int64, -1 behind the active patches
        self.losses = torch.zeros(len(self.loss_moments), device=vit.device)

    def __call__(self, at: Iteration) -> None:
        if at.batch:
            return
        place = self.loss_moments.get(at.iteration)
        if place is not None:
            self.losses[place] = at.value
        place = self.moments.get(at.iteration)
        if place is not None:
            self.pixels[place] = at.images[0]
            self.index[place, : at.active] = at.index[0]

    def buffers(self) -> dict[str, Tensor]:
        """What grows while the batch is made."""
        return {"pixels": self.pixels, "index": self.index, "losses": self.losses}

    def save(self, folder: Path) -> None:
        """Write the snapshots beside the images; raises RunError where that fails."""
        tensors = {
            "pixels": self.pixels,
            "index": self.index,
            "losses": self.losses,
            "iterations": torch.tensor(list(self.moments), dtype=torch.int64),
            "loss_iterations": torch.tensor(list(self.loss_moments), dtype=torch.int64),
            "label": self.run.labels[:1],
        }
        about = {"format": FORMAT, "run": self.run.provenance["run"]}
        try:
            replace_file(folder / FILE, lambda path: save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path, metadata=about))
        except (OSError, SafetensorError) as error:
            raise RunError(f"writing {folder / FILE} failed ({getattr(error, 'strerror', None) or error})") from error


def load_progress(folder: str | Path, run: str | None) -> Progress | None:
    """What was kept beside the images of `run` (provenance["run"]); None where there is nothing, or only of another run. Raises InputError where it
    cannot be read."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        held, about = read_tensors(path)
        if about.get("format") != FORMAT or about.get("run") != run:
            return None
        _check(held)
        return Progress(
            pixels=held["pixels"],
            active=[row[row >= 0] for row in held["index"]],
            iterations=held["iterations"].tolist(),
            losses=held["losses"],
            loss_iterations=held["loss_iterations"].tolist(),
            label=int(held["label"]),
        )
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error


def _check(held: dict[str, Tensor]) -> None:
    """Raise ValueError where tensors of a file do not fit one another."""
    (k, l), n = (held[name].numel() for name in ("iterations", "losses")), held["index"].shape[-1] if held["index"].ndim == 2 else -1
    wanted = {"index": (k, n), "losses": (l,), "iterations": (k,), "loss_iterations": (l,), "label": (1,)}
    for name, shape in wanted.items():
        if tuple(held[name].shape) != shape or held[name].is_floating_point() != (name == "losses") or held[name].dtype == torch.bool:
            raise ValueError(f"{name} is {held[name].dtype} {list(held[name].shape)}")
    pixels, index = held["pixels"], held["index"]
    if (
        pixels.ndim != 4
        or len(pixels) != k
        or not pixels.is_floating_point()
        or (index.numel() and not -1 <= int(index.min()) <= int(index.max()) < n)
    ):
        raise ValueError(f"pixels {list(pixels.shape)} and index {list(index.shape)} do not fit")
