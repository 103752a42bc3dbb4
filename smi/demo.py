"""The main job on the embedded teacher: every method, the same number of images, one table and one picture."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import cost
from .forward import forward_sparse
from .inversion import invert
from .models import ViT, describe
from .report import picture_grid, rows_of
from .schedules import Schedule, make_schedule
from .sparse_images import SparseImages
from .storage import output_folder
from .teachers import digits

METHODS = (
    ("dense", {}),
    ("smi", {}),
    ("pri", {"division": 2}),
    ("pri", {"division": 4}),
    ("pri", {"division": 4, "importance": "random"}),  # what attention has to beat
    ("pri", {"division": 7}),
)
NUM_IMAGES = 84  # whole trajectories for v = 2, 4 and 7
BATCH_SIZE = 12  # the same for every method: total variation weighs more in larger batches
ITERATIONS = 200
WARM_UP = 4  # iterations
TV_WEIGHT = 5e-3


@dataclass(frozen=True)
class Row:
    """One method's line of the table."""

    method: str
    sparsity: float
    images: int
    seconds: float
    speedup: float  # images per second over dense, measured
    flops_speedup: float  # the same as FLOPs per image predict
    agreement: float  # share of the images that the teacher assigns to their label

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def title(method: str, options: dict) -> str:
    name = {"dense": "dense", "smi": "SMI"}.get(method, f"PRI v={options.get('division')}")
    return f"{name}, {options['importance']}" if "importance" in options else name


def compare(
    model: torch.nn.Module,
    methods: Sequence[tuple[str, dict]] = METHODS,
    *,
    num_images: int = NUM_IMAGES,
    iterations: int = ITERATIONS,
    output: Path | None = None,
    force: bool = False,
    **settings,
) -> tuple[list[Row], dict[str, SparseImages]]:
    """Invert the model with every method, dense first, and measure; `each` is called as soon as a method has ended. settings: those of
    `smi.invert`."""
    vit = describe(model)
    rows: list[Row] = []
    made: dict[str, SparseImages] = {}
    invert(model, method="dense", num_images=1, iterations=WARM_UP, **{**settings, "progress": False})  # allocator and thread pool
    schedules = [_schedule(vit, method, iterations, options) for method, options in methods]
    for (method, options), schedule in zip(methods, schedules, strict=True):
        folder = None if output is None else output / title(method, options).lower().replace(" v=", "").replace(", ", "-")
        began = time.perf_counter()
        images = invert(model, method=method, num_images=num_images, iterations=iterations, output=folder, force=force, **options, **settings)
        seconds = time.perf_counter() - began
        with torch.no_grad():
            agreement = (forward_sparse(model, images).argmax(1).cpu() == images.labels).double().mean().item()
        flops = cost.image_flops(vit, schedule)
        dense_seconds, dense_flops = (
            (rows[0].seconds, cost.image_flops(vit, make_schedule("dense", vit.num_patches, iterations))) if rows else (seconds, flops)
        )
        row = Row(title(method, options), schedule.sparsity, len(images), seconds, dense_seconds / seconds, dense_flops / flops, agreement)
        rows.append(row)
        made[row.method] = images
    return rows, made


def _schedule(vit: ViT, method: str, iterations: int, options: dict) -> Schedule:
    return make_schedule(method, vit.num_patches, iterations, division=options.get("division"))


def demo(folder: str | Path, *, iterations: int = ITERATIONS, seed: int = 0, progress: bool = True, force: bool = False) -> dict:
    """Invert the digits teacher with all methods; writes the images of each and demo.png into folder. Returns the table and the picture's path as
    data. Raises InputError, before anything is made, where folder is not empty and not `force`."""
    folder = output_folder(folder, force)
    rows, made = compare(
        digits(),
        iterations=iterations,
        output=folder,
        force=force,
        batch_size=BATCH_SIZE,
        tv_weight=TV_WEIGHT,
        labels=range(10),
        seed=seed,
        progress=progress,
    )
    picture = picture_grid(_rows(made), folder / "demo.png", title="Digits synthesised from the embedded teacher, without data")
    table = [{**asdict(row), "images_per_second": row.images_per_second} for row in rows]
    return {"table": table, "picture": str(picture), "settings": made["dense"].provenance}


def _rows(made: dict[str, SparseImages]) -> list[tuple[str, SparseImages]]:
    """Dense, SMI, and the stages of PRI v = 4, one digit a column."""
    return [
        ("dense", made["dense"][:10]),
        ("SMI", made["SMI"][:10]),
        *((f"PRI v=4, {name}", images) for name, images in rows_of(made["PRI v=4"], columns=10)),
    ]
