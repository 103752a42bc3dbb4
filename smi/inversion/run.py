"""A prepared run: everything that decides its images, and the record of it that is kept with them."""

import datetime
import platform
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..engine import Fused
from ..kernels.versions import backend
from ..models.levels import Model
from ..plain import for_json
from ..random_streams import generator
from ..version import __version__
from .importance import Snapshot
from .losses import Loss
from .schedules import Schedule
from .settings import Settings


@dataclass(eq=False)
class Run:
    """What the loop reads. settings: the caller's, completed with what None stands for."""

    settings: Settings
    vit: Model
    schedule: Schedule
    labels: Tensor  # int64 [trajectories]
    table: Tensor  # int32 [iterations, 3], (dy, dx, flip)
    losses: Sequence[Loss]
    importance: Callable[[Snapshot], Tensor]
    fused: Fused | None  # the engine; None for the reference and for a model at level module
    chunk: int | None = None  # trajectories whose passes run together, None for all of a batch
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of the pixels."""
        return self.vit.dtype

    @property
    def batch_size(self) -> int:
        """Trajectories of a whole batch."""
        return self.settings.batch_size

    def generator(self, purpose: str, trajectory: int = 0) -> torch.Generator:
        """The stream of random numbers for a purpose and trajectory, as in `random_streams`."""
        return generator(self.settings.seed, purpose, trajectory)


def provenance_of(run: Run) -> dict[str, Any]:
    """Every setting of the run, completed, and the software it ran on, as JSON."""
    import timm  # slow: it brings torchvision

    recorded = {each.name: each.metadata["recorded"] for each in fields(Settings) if each.metadata["recorded"]}
    about = {
        **{name: record(getattr(run.settings, name)) for name, record in recorded.items()},
        "model": run.vit.name,
        "weights_sha256": run.vit.weight_hash(),
        "schedule": [asdict(event) for event in run.schedule.events],
        "backend": backend(),
        **({"operations": run.fused.describe(run.chunk or run.batch_size)["versions"]} if run.fused else {}),
        "run": uuid.uuid4().hex,
        "versions": {"smi": __version__, "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return for_json(about)
