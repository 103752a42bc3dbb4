"""The inversion loop: pixels optimised against a frozen ViT, patches leaving as the schedule says.

    x <- clip(Adam(x, gradient of  CE(f(aug(x)), y) + a_tv TV(x) + a user's terms  at the active pixels))

Dense, SMI and PRI differ only by their schedule. Pixels of patches that left are frozen: no gradient, no momentum.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError, RunError
from ..images.patches import to_patches
from ..images.sparse_images import SparseImages
from ..kernels.attention.reference import take_rows
from . import importance as ranking
from .graph import Runner
from .memory_estimate import out_of_memory, ran_out
from .progress import show_progress
from .schedules import Event
from .settings import Iteration, Run, prepare
from .snapshots import SNAPSHOTS, Recorder, check_snapshots
from .step import Step


def _takes_settings(function: Callable) -> Callable:
    """Show the settings of `prepare`, which `function` passes on, in the signature that help() and editors show."""
    own = signature(function)
    parameters = {**signature(prepare).parameters, **own.parameters}
    del parameters["settings"]
    function.__signature__ = own.replace(parameters=list(parameters.values()))
    return function


@_takes_settings
def invert(
    model: nn.Module,
    *,
    output: str | Path | None = None,
    force: bool = False,
    snapshots: int = SNAPSHOTS,
    progress: bool = True,
    on_batch: Callable[[SparseImages], None] | None = None,
    **settings,
) -> SparseImages:
    """Synthesise sparse images from a trained timm ViT, without data.

    The settings are those of `invert_batches`, and: output: a folder to which every finished batch is written at once, so that an interrupted run
    keeps it; force: replace the images in it; snapshots: how many of the first trajectory are kept there for `smi report`, 0 for none. progress: show
    iteration, it/s, loss, active patches and time left on the terminal. on_batch: called with each finished batch, once it is written. Raises
    InputError for what cannot be done, RunError where a run fails.
    """
    from ..images.storage import Writer

    check_snapshots(snapshots)
    run, on_iteration = prepare(model, **settings)
    writer = None if output is None else Writer(output, force=force)
    recorder = Recorder(run, snapshots) if writer is not None and snapshots and run.schedule.iterations else None
    parts: list[SparseImages] = []
    try:
        with show_progress(_both(recorder, on_iteration), "{method}, {engine} {dtype}".format(**run.provenance), shown=progress) as report:
            for part in run_batches(run, report):
                parts.append(part)
                if writer is not None:
                    writer.add(part)
                if recorder is not None and len(parts) == 1:
                    recorder.save(writer.folder)
                if on_batch is not None:
                    on_batch(part)
    finally:
        if writer is not None:
            writer.close(complete=sum(map(len, parts)) == run.num_images)
    return SparseImages.cat(parts)


def _both(first: Callable | None, second: Callable | None) -> Callable | None:
    """A callback that calls two, either of which may be missing."""
    if first is None or second is None:
        return first or second

    def call(at: Iteration) -> None:
        first(at)
        second(at)

    return call


@_takes_settings
def invert_batches(model: nn.Module, **settings) -> Iterator[SparseImages]:
    """Like `invert`, one SparseImages per finished batch.

    method: "dense" (DeepInversion), "smi" (Sparse Model Inversion), "pri" (Patch Rebirth Inversion), "psaq" (PSAQ-ViT: dense, with its own loss,
    optimiser and jitter) or "gaussian" (noise, nothing optimised). num_images: finished images.
    labels: classes to invert, one per trajectory, cycled when shorter; None draws them from the seed.
    iterations: updates per batch. batch_size: trajectories per batch.
    schedule: a `Schedule` of the caller's own, instead of the method's; prune_at, prune_ratio (smi), division (pri): the method's options.
    importance: "cls_attention", "random" or a function of `importance.Snapshot` that returns scores [B, n].
    losses: functions of (images, logits, labels) to be summed; None: the method's own, which for all but "psaq" is "default", cross-entropy +
    tv_weight * total variation; "psaq": PSAQ-ViT's with any method. lr, betas: of Adam, None: the method's own.
    init: [trajectories, C, H, W] normalised pixels to start from; None: Gaussian noise from the seed.
    augmentation: one (dy, dx, flip) per iteration, in pixels, the same for every batch, taken as (0, 0, False) at an event and one
    iteration before it; None draws them, offsets up to jitter (None: an eighth of
    each side).
    engine: "fused" or "reference"; None: fused, unless a loss or dtype="float64" needs the reference. dtype: of the model's arithmetic, "float32",
    "bfloat16" or "float16" (fused), "float32" or "float64" (reference); "auto": what the device computes faster in; pixels are float32, or float64.
    update: "active" freezes the pixels of patches that left, "all" goes on moving every pixel, as published code does. max_memory: GiB beside the
    weights: the passes of a batch then run in as many parts as that takes (fused). recompute: keep five ninths for the backward pass, for a sixth
    more FLOPs (fused).
    flip, mean, std: facts of the training data, None: the model's own. device: None: a GPU if there is one, else the model's.
    on_iteration: called with an `Iteration` after each update. seed: of everything drawn.
    """
    run, on_iteration = prepare(model, **settings)
    return run_batches(run, on_iteration)


def run_batches(run: Run, on_iteration: Callable[[Iteration], None] | None = None) -> Iterator[SparseImages]:
    """The batches of a prepared run, one after another."""
    began = time.perf_counter()
    starts = range(0, len(run.labels), run.batch_size)
    left = run.num_images
    for batch, start in enumerate(starts):
        trajectories = range(start, min(start + run.batch_size, len(run.labels)))

        def report(iteration, loss, active, images, index, labels, batch=batch):
            if on_iteration is not None:
                seconds = time.perf_counter() - began
                on_iteration(Iteration(batch, len(starts), iteration, run.schedule.iterations, loss, active, seconds, images, index, labels))

        try:
            part = run_batch(run, trajectories, report)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed pass
            raise out_of_memory(run.vit, run.schedule, len(trajectories), fused=run.fused and run.fused.mode) from error
        part = part[: min(left, len(part))]
        left -= len(part)
        yield part


def run_batch(run: Run, trajectories: range, report: Callable[..., None]) -> SparseImages:
    """Optimise one batch of trajectories from noise to its finished images."""
    vit, device = run.vit, run.vit.device
    labels = run.labels[list(trajectories)].to(device)
    images = _initial(run, trajectories)
    moments = torch.zeros_like(images), torch.zeros_like(images)
    index = torch.arange(vit.num_patches, device=device).expand(len(trajectories), -1)
    generators = [run.generator("importance", trajectory) for trajectory in trajectories]
    low, high = (bound.to(images) for bound in vit.valid_range())
    table, curve = run.table.to(device), torch.zeros(run.schedule.iterations, dtype=images.dtype, device=device)
    emitted: list[tuple[Tensor, Tensor]] = []
    for stage in run.schedule.stages():
        if stage.start == stage.stop:
            continue  # noise, which nothing moves
        step = Step(
            run.fused or vit, images, moments, labels, index, run.losses, low, high,
            lr=run.lr, betas=run.betas, update=run.update, chunk=run.chunk,
        )  # fmt: skip
        runner = Runner(step, table, curve, stage.start)
        for t in range(stage.start, stage.stop):
            ranked = images.clone() if t == stage.stop - 1 and stage.event is not None else None
            runner()
            if runner.graph is None or t == stage.stop - 1:  # a captured stage is looked at when it is over
                _refuse_diverged(curve[stage.start : t + 1], stage.start, trajectories)
            report(t, curve[t], stage.active, images, index, labels)
        if stage.event is not None:
            snapshot = ranking.Snapshot(ranked, index, labels, step.output.logits.detach(), step.output.attention, generators)
            index, leaving = _split(run, stage.event, snapshot)
            if stage.event.fate == "emit":
                emitted.append((take_rows(to_patches(images, vit.patch_size), leaving), leaving))
        runner = step = snapshot = ranked = None  # the memory of a stage is free before the next one takes its own
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


def _split(run: Run, event: Event, snapshot: ranking.Snapshot) -> tuple[Tensor, Tensor]:
    """Patches that stay active and patches that leave, each int64 [B, n] ascending."""
    with torch.no_grad():
        scores = run.importance(snapshot)
    if scores.shape != snapshot.index.shape:
        raise InputError(f"importance must return scores {list(snapshot.index.shape)}, one per active patch, got {list(scores.shape)}")
    if torch.isnan(scores).any():
        raise RunError(f"importance gave NaN at iteration {event.iteration}: patches cannot be ranked")
    leaving, staying = ranking.choose(scores, event.count, highest=event.which == "highest")
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
    if run.init is not None:
        images = run.init[trajectories.start : trajectories.stop].detach().clone(memory_format=torch.contiguous_format)
    else:
        shape = (run.vit.channels, *run.vit.image_size)
        images = torch.stack([torch.randn(shape, generator=run.generator("noise", trajectory), dtype=torch.float64) for trajectory in trajectories])
    return images.to(run.vit.device, run.dtype)
