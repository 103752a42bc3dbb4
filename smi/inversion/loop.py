"""The inversion loop: pixels optimised against a frozen ViT, patches leaving as the schedule says.

    x <- clip(Adam(x, gradient of  CE(f(aug(x)), y) + a_tv TV(x) + a user's terms  at the active pixels))

Dense, SMI and PRI differ only by their schedule. Pixels of patches that left are frozen: no gradient, no momentum.
"""

import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, RunError
from ..images.patches import to_patches
from ..images.sparse_images import SparseImages
from ..kernels.attention.reference import take_rows
from ..runs.asked import asked_of
from ..runs.batch_state import restore, save
from ..runs.checkpoint import Checkpoint
from ..runs.folder import RunFolder, open_run
from ..surroundings import at_the_door, door
from . import importance
from .graph import Runner
from .memory_estimate import out_of_memory, ran_out
from .prepare import prepare
from .progress import Iteration, Report, show_progress
from .run import Run
from .schedules import Event
from .settings import InvertSettings, Settings, by_keyword
from .snapshots import Recorder
from .step import Step

Batches = Generator[tuple[int, SparseImages], None, None]  # with their numbers


@by_keyword(InvertSettings)
@at_the_door
def invert(model: nn.Module, settings: InvertSettings) -> SparseImages:
    """Synthesise images from a trained model, without data: sparse ones from a timm ViT, whole ones from any classifier (method "dense").

    {settings}

    Raises InputError for what cannot be done, RunError where a run fails.
    """
    run = prepare(model, settings)
    folder = None if settings.output is None else _open(run, settings)
    recorder = Recorder(run, settings.snapshots) if folder is not None and settings.snapshots and run.schedule.iterations else None
    title = "{method}, {engine} {dtype}".format(**run.provenance)
    parts: dict[int, SparseImages] = {}
    with (
        nullcontext() if folder is None else folder,
        show_progress(_both(recorder, settings.on_iteration), title, shown=settings.progress) as report,
        closing(run_batches(run, report) if folder is None else _batches_of_folder(run, folder, recorder, settings.checkpoint_every, report)) as made,
    ):
        for number, part in made:
            parts[number] = part
            if settings.on_batch is not None:
                settings.on_batch(part)
        if folder is not None:
            parts = {number: parts[number] if number in parts else folder.load(number) for number in folder.shards()}
    return SparseImages.cat([parts[number] for number in sorted(parts)])


def _open(run: Run, settings: InvertSettings) -> RunFolder:
    """The run in the output folder, begun or gone on with; `run` takes its provenance."""
    count, images = run.settings.num_images, settings.batch_size * run.schedule.images_per_trajectory
    about = {"grid": run.vit.grid, "mean": run.vit.mean, "std": run.vit.std}
    new = RunFolder(Path(settings.output), run.provenance["run"], asked_of(run, settings), count, images, about, run.provenance)  # type: ignore[arg-type]
    folder = open_run(new, force=settings.force)
    run.provenance = folder.provenance
    return folder


def _batches_of_folder(run: Run, folder: RunFolder, recorder: Recorder | None, every: float, report: Report) -> Batches:
    """The batches that this process makes of a run in a folder, with their numbers, each written."""
    clock = Clock(run, report)
    for number in folder.take():
        checkpoint = folder.checkpoint(number, every, recorder.buffers() if recorder is not None and number == 0 else None)
        part = make_batch(run, number, clock, checkpoint)
        folder.publish(number, part)
        if recorder is not None and number == 0:
            recorder.save(folder.folder)
        yield number, part


def _both(first: Callable | None, second: Callable | None) -> Callable | None:
    """A callback that calls two, either of which may be missing."""
    if first is None or second is None:
        return first or second

    def call(at: Iteration) -> None:
        first(at)
        second(at)

    return call


@by_keyword(Settings)
def invert_batches(model: nn.Module, settings: Settings) -> Iterator[SparseImages]:
    """Like `invert`, one SparseImages per finished batch.

    {settings}
    """
    with door():
        batches = run_batches(prepare(model, settings), settings.on_iteration)
    return _each_at_the_door(part for _, part in batches)


def _each_at_the_door(batches: Iterator[SparseImages]) -> Iterator[SparseImages]:
    """The batches, each made behind a door that is closed again before the caller has it."""
    while True:
        with door():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def run_batches(run: Run, on_iteration: Report | None = None) -> Generator[tuple[int, SparseImages], None, None]:
    """The batches of a prepared run, one after another, with their numbers."""
    clock = Clock(run, on_iteration)
    for number in range(clock.batches):
        yield number, make_batch(run, number, clock)


class Clock:
    """Tells `on_iteration` where a run is, and since when it runs."""

    def __init__(self, run: Run, on_iteration: Report | None):
        self.run, self.on_iteration = run, on_iteration
        self.batches = -(-len(run.labels) // run.batch_size)
        self.began, self.made = time.perf_counter(), 0

    def report(self, batch: int, iteration: int, loss: Tensor, active: int, images: Tensor, index: Tensor, labels: Tensor) -> None:
        self.made += 1
        if self.on_iteration is not None:
            seconds, iterations = time.perf_counter() - self.began, self.run.schedule.iterations
            self.on_iteration(Iteration(batch, self.batches, iteration, iterations, loss, active, seconds, images, index, labels, self.made))


def make_batch(run: Run, number: int, clock: Clock, checkpoint: Checkpoint | None = None) -> SparseImages:
    """Make one batch. Raises RunError where it diverges or memory does not suffice."""
    start = number * run.batch_size
    trajectories = range(start, min(start + run.batch_size, len(run.labels)))
    try:
        part = run_batch(run, trajectories, partial(clock.report, number), checkpoint)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed pass
        raise out_of_memory(run.vit, run.schedule, len(trajectories), fused=run.fused.mode if run.fused else None) from error
    return part[: run.settings.num_images - start * run.schedule.images_per_trajectory]


def run_batch(run: Run, trajectories: range, report: Callable[..., None], checkpoint: Checkpoint | None = None) -> SparseImages:
    """Optimise one batch of trajectories from noise, or from where its checkpoint is, to its finished images."""
    vit, device = run.vit, run.vit.device
    labels = run.labels[list(trajectories)].to(device)
    images = _initial(run, trajectories)
    moments = torch.zeros_like(images), torch.zeros_like(images)
    index = torch.arange(vit.num_patches, device=device).expand(len(trajectories), -1)
    generators = [run.generator("importance", trajectory) for trajectory in trajectories]
    low, high = (bound.to(images) for bound in vit.valid_range())
    table, curve = run.table.to(device), torch.zeros(run.schedule.iterations, dtype=images.dtype, device=device)
    emitted: list[tuple[Tensor, Tensor]] = []
    begin = 0
    if checkpoint is not None:
        begin, index, emitted = restore(checkpoint, run.schedule, vit, images, moments, index, generators)
    for stage in run.schedule.stages():
        if stage.stop <= begin or stage.start == stage.stop:
            continue  # over already, or noise, which nothing moves
        step = Step(
            run.fused or vit, images, moments, labels, index, run.losses, low, high,
            lr=run.settings.lr, betas=run.settings.betas, update=run.settings.update, chunk=run.chunk,  # type: ignore[arg-type]  # completed
        )  # fmt: skip
        begin = max(begin, stage.start)
        runner = Runner(step, table, curve, begin)
        for t in range(begin, stage.stop):
            if checkpoint is not None and checkpoint.due():
                save(checkpoint, t, images, moments, index, generators, emitted)
            ranked: Any = images.clone() if t == stage.stop - 1 and stage.event is not None else None
            runner()
            if runner.graph is None or t == stage.stop - 1:  # a captured stage is looked at when it is over
                _refuse_diverged(curve[begin : t + 1], begin, trajectories)
            report(t, curve[t], stage.active, images, index, labels)
        if stage.event is not None:
            snapshot = importance.Snapshot(ranked, index, labels, step.output.logits.detach(), step.output.attention, generators)
            index, leaving = _split(run, stage.event, snapshot)
            if stage.event.fate == "emit":
                emitted.append((take_rows(to_patches(images, vit.patch_size), leaving), leaving))
        runner = step = snapshot = ranked = None  # type: ignore[assignment]  # the memory of a stage is free before the next one takes its own
    emitted.append((take_rows(to_patches(images, vit.patch_size), index), index))
    return _collect(run, trajectories, emitted)


def _refuse_diverged(curve: Tensor, first: int, trajectories: range) -> None:
    """Raise RunError at the first loss of iterations `first` and on that is not a number."""
    finite = torch.isfinite(curve)
    if finite.all():
        return
    at = int((~finite).nonzero()[0])
    where = f"iteration {first + at} of trajectories {trajectories.start} to {trajectories.stop - 1}"
    raise RunError(f"the loss is {float(curve[at])} at {where}: the run has diverged or a loss term is undefined there")


def _split(run: Run, event: Event, snapshot: importance.Snapshot) -> tuple[Tensor, Tensor]:
    """Patches that stay active and patches that leave, each int64 [B, n] ascending."""
    with torch.no_grad():
        scores = run.importance(snapshot)
    if scores.shape != snapshot.index.shape:
        raise InputError(f"importance must return scores {list(snapshot.index.shape)}, one per active patch, got {list(scores.shape)}")
    if torch.isnan(scores).any():
        raise RunError(f"importance gave NaN at iteration {event.iteration}: patches cannot be ranked")
    leaving, staying = importance.choose(scores, event.count, highest=event.which == "highest")
    return snapshot.index.gather(1, staying), snapshot.index.gather(1, leaving)


def _collect(run: Run, trajectories: range, emitted: list[tuple[Tensor, Tensor]]) -> SparseImages:
    """The finished images of a batch, those of a trajectory side by side in order of stage."""
    if not all(torch.isfinite(patches).all() for patches, _ in emitted):
        raise RunError("the last update made pixels NaN or infinite: a loss term has no gradient there")
    stages = len(emitted)
    numbers = torch.arange(trajectories.start, trajectories.stop)
    return SparseImages(
        patches=torch.stack([patches for patches, _ in emitted], dim=1).flatten(0, 1).cpu(),
        index=torch.stack([index for _, index in emitted], dim=1).flatten(0, 1).cpu(),
        labels=run.labels[list(trajectories)].repeat_interleave(stages),
        trajectory=numbers.repeat_interleave(stages),
        stage=torch.arange(stages).repeat(len(numbers)),
        grid=run.vit.grid,
        mean=run.vit.mean,
        std=run.vit.std,
        provenance=run.provenance,
    )


def _initial(run: Run, trajectories: range) -> Tensor:
    if run.settings.init is not None:
        images = run.settings.init[trajectories.start : trajectories.stop].detach().clone(memory_format=torch.contiguous_format)
    else:
        shape = (run.vit.channels, *run.vit.image_size)
        images = torch.stack([torch.randn(shape, generator=run.generator("noise", trajectory), dtype=torch.float64) for trajectory in trajectories])
    return images.to(run.vit.device, run.dtype)
