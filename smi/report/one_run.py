"""The sections about one folder of images: grid, stages, retained patches, recognition, one image's progress, loss, provenance."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..evaluate import Evaluation, Recognition
from ..images.sparse_images import SparseImages
from ..inversion.methods import HEADINGS
from ..inversion.schedules import Event
from ..inversion.snapshots import Progress, load_progress
from . import pictures, plots
from .evidence_data import is_number
from .page import Figure, Part, Section, Table, number, per_cent

MAPS = 28  # stages of which a map is drawn
COLUMNS = 10  # trajectories side by side
OVERVIEW = "Some images of every method, their labels above; of PRI each is of another stage. Grey cells are patches that an image does not have."

EVENT = {field.name for field in fields(Event)}
DEEPEST = 8  # settings within settings that have lines of their own

Place = Callable[[str], Path]  # where the picture of a name goes


@dataclass(frozen=True, eq=False)
class Result:
    """A folder of images, read."""

    name: str
    images: SparseImages
    progress: Progress | None
    complaint: str  # why the progress cannot be read; empty where it can or there is none
    found: Evaluation | None
    judged: str  # by whom, or why not

    @property
    def stages(self) -> int:
        return int(self.images.stage.max()) + 1


def read_result(folder: Path, name: str, judge) -> Result:
    """The images of a folder, judged; raises InputError where they cannot be read."""
    images = SparseImages.load(folder)
    if not len(images):
        raise InputError(f"{folder} holds no images")
    progress, complaint = None, ""
    try:
        progress = load_progress(folder, images.provenance.get("run"))
    except InputError as error:
        complaint = str(error)
    return Result(name, images, progress, complaint, *judge(images))


def summary(result: Result) -> str:
    """What the folder holds, in a sentence or two."""
    images = result.images
    cells = images.grid[0] * images.grid[1]
    labels = len(images.labels.unique())
    kept = f"all {cells} patches" if images.sparsity == 0 else f"{images.index.shape[1]} of {cells} patches ({images.sparsity:.0%} sparse)"
    many = "1 class" if labels == 1 else f"{labels} classes"
    text = f"{len(images)} images of {many}, each with {kept}, {images.image_size[0]}×{images.image_size[1]} px"
    if result.stages > 1:
        text += f", from {len(images.trajectory.unique())} trajectories in {result.stages} stages"
    cut = "" if images.provenance.get("complete", True) else " The run did not come to its end: these are the batches that were finished."
    return f"{text}.{cut}"


def sections(result: Result, place: Place, lines: int = pictures.LINES) -> list[Section]:
    """The chapters of the page of one folder; lines: of images, where they are in no stages."""
    return [
        Section("Images", image_parts(result, place, lines)),
        Section("Retained patches", patch_parts(result, place)),
        Section("Recognition", recognition_parts(result, place)),
        Section("Progress of one image", progress_parts(result, place)),
        Section("Provenance", [provenance_table(result.images.provenance)]),
    ]


def image_parts(result: Result, place: Place, lines: int) -> list[Part]:
    """The grid; of a run in stages by stages, with all of them together below."""
    images, rows = result.images, pictures.rows_of(result.images, COLUMNS, lines)
    staged = result.stages > 1 and rows[0][0].startswith("stage")
    if staged:
        rows = [*rows, ("together", pictures.together(images, COLUMNS))]
    path = pictures.picture_grid(rows, place("images"))
    shown = max(len(some) for _, some in rows) if staged else sum(len(some) for _, some in rows)
    if staged:
        caption = (
            f"The first {shown} trajectories, one in each column, its label above. Each row is a stage: the patches that left then, as a finished "
            "sparse image; grey cells belong to other stages. The last row puts all stages of a trajectory together."
        )
    else:
        grey = "" if images.sparsity == 0 else " Grey cells are patches that an image does not have."
        caption = f"The first {shown} of {len(images)} images, their labels above.{grey}"
    return [Figure(path, caption, f"Grid of synthesised images of {result.name}")]


def patch_parts(result: Result, place: Place) -> list[Part]:
    """How often each cell of the grid is retained, by stage; and which stage took which cell."""
    images = result.images
    if images.sparsity == 0:
        return ["Every image has all its patches."]
    chosen = [round(i * (result.stages - 1) / max(1, min(MAPS, result.stages) - 1)) for i in range(min(MAPS, result.stages))]
    maps = [(f"stage {stage + 1}" if result.stages > 1 else "all images", retained_fraction(images, stage)) for stage in chosen]
    chance = f"By chance every cell would have {1 - images.sparsity:.0%}."
    parts: list[Part] = [
        Figure(
            plots.plot_maps(maps, place("retained")),
            f"In which fraction of the images each cell of the {images.grid[0]}×{images.grid[1]} grid is retained"
            f"{', stage by stage' if result.stages > 1 else ''}. {chance}",
            f"Maps of how often each patch is retained by {result.name}",
        )
    ]
    if result.stages > 1 and len(pictures.whole_trajectories(images)):
        path = plots.plot_stage_maps(stage_maps(images), result.stages, place("stages"))
        caption = "The stage at which each patch left, for the same trajectories as above: dark cells left first, bright ones evolved to the end."
        parts.append(Figure(path, caption, f"Maps of the stage at which each patch of {result.name} left"))
    return parts


def retained_fraction(images: SparseImages, stage: int) -> Tensor:
    """float64 [rows, columns]: the fraction of the images of a stage that have each cell."""
    index = images.index[images.stage == stage]
    counts = torch.bincount(index.flatten(), minlength=images.grid[0] * images.grid[1])
    return counts.double().div(max(1, len(index))).view(images.grid)


def stage_maps(images: SparseImages) -> list[tuple[str, Tensor]]:
    """For each of the first trajectories, the stage of each cell [rows, columns], NaN where none took it."""
    maps = []
    for trajectory in pictures.whole_trajectories(images)[:COLUMNS].tolist():
        some = images[images.trajectory == trajectory]
        cells = torch.full((images.grid[0] * images.grid[1],), float("nan"))
        cells[some.index.flatten()] = some.stage.float()[:, None].expand(some.index.shape).flatten()
        maps.append((f"label {int(some.labels[0])}", cells.view(images.grid)))
    return maps


def recognition_parts(result: Result, place: Place) -> list[Part]:
    """What the model says of the images, stage by stage."""
    found = result.found
    if found is None:
        return [result.judged]
    rows = [_row("all images", found.teacher)]
    if found.random is not None:
        rows += [_row(f"stage {stage} of {len(found.stages)}", values) for stage, values in enumerate(found.stages, start=1)]
        rows.append(_row("patches at random", found.random))
    columns = ["read by the model", "images", "agree with their label", "confidence", "cross-entropy"]
    note = "Confidence is the probability of the label." + (
        " Patches at random: as many patches, drawn from everything that the same trajectory emitted." if found.random else ""
    )
    parts: list[Part] = [result.judged, Table("Recognition by the model", columns, rows, note)]
    if found.random is not None:
        levels = found.random.agreement, found.random.confidence
        path = plots.plot_stages([s.agreement for s in found.stages], [s.confidence for s in found.stages], levels, place("recognition"))
        caption = (
            "How well the model recognises what left at each stage. Dotted: images of as many patches drawn at random from the same trajectories; "
            "where the line rises above it, the choice of patches is worth something."
        )
        parts.append(Figure(path, caption, f"Agreement and confidence by stage of {result.name}"))
    return parts


def _row(name: str, values: Recognition) -> list[str]:
    return [name, str(values.images), per_cent(values.agreement), number(values.confidence, 3), number(values.cross_entropy, 3)]


def progress_parts(result: Result, place: Place) -> list[Part]:
    """Snapshots of the first trajectory, and the loss of its batch."""
    progress, images = result.progress, result.images
    if progress is None:
        none = "No snapshots of this run were kept: smi invert keeps them in the folder of its images unless --snapshots is 0."
        if images.provenance.get("iterations") == 0:
            return ["Nothing was optimised: the images are what they were at the start."]
        return [f"The snapshots cannot be read: {result.complaint}." if result.complaint else none]
    left = any(len(index) < images.grid[0] * images.grid[1] for index in progress.active)
    fate = "go on moving" if images.provenance.get("update") == "all" else "are frozen"
    caption = (
        f"One image of label {progress.label} through {progress.iterations[-1] + 1} iterations, from nearly noise on."
        + (f" Below: the patches that were active, the others grey; patches that left {fate}." if left else "")
    )  # fmt: skip
    path = pictures.progress_picture(progress, images, place("progress"))
    parts: list[Part] = [Figure(path, caption, f"One image of {result.name} at {len(progress.iterations)} iterations of its run")]
    if progress.loss_iterations:
        events = [event["iteration"] for event in _events(images.provenance.get("schedule"))]
        path = plots.plot_loss(progress.loss_iterations, progress.losses, events, place("loss"))
        caption = "The loss of the first batch." + (" Dotted: iterations at which patches left." if events else "")
        parts.append(Figure(path, caption, f"Loss curve of {result.name}"))
    return parts


def provenance_table(provenance: dict, caption: str = "Everything that decided the images") -> Table:
    """Every setting of a run, a row each."""
    return Table(caption, ["setting", "value"], list(_flat(provenance)), words=True)


def title(images: SparseImages) -> str:
    """What the images are, for the head of the page."""
    method = str(images.provenance.get("method", ""))
    return f"{HEADINGS.get(method, method)} inversion of {images.provenance.get('model', 'a model')}"


def _events(schedule: Any) -> list[dict]:
    """The events of a schedule in a provenance; none where it is not one that a run writes: the file may come from anywhere."""
    whole = isinstance(schedule, list) and all(isinstance(event, dict) and event.keys() >= EVENT for event in schedule)
    return schedule if whole and all(is_number(event[name]) for event in schedule for name in ("iteration", "count")) else []


def _event(event: dict) -> str:
    leaving = f"before iteration {event['iteration']} the {event['count']} patches of {event['which']} importance"
    return f"{leaving} leave {'as an image' if event['fate'] == 'emit' else 'for good'}"


def _flat(settings: dict, prefix: str = ""):
    """Rows of (name, value), nested settings by their dotted names."""
    for name, value in settings.items():
        if name == "schedule" and _events(value):
            yield f"{prefix}{name}", "; ".join(map(_event, value))
        elif isinstance(value, dict) and prefix.count(".") < DEEPEST:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
