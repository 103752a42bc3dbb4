"""The inversion loop: pixels optimised against a frozen ViT, patches leaving as the schedule says.

    x <- clip(Adam(x, gradient of  CE(f(aug(x)), y) + a_tv TV(x) + a user's terms  at the active pixels))

Dense, SMI and PRI differ only by their schedule. Pixels of patches that left are frozen: no gradient, no momentum.
"""

import math
import time
import traceback
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn

from . import engine
from . import importance as ranking
from .errors import InputError, RunError
from .kernels.attention.reference import take_rows
from .kernels.image_step import image_step
from .losses import needs_attention_outputs, total
from .memory import out_of_memory, ran_out
from .patches import to_patches
from .progress import show_progress
from .schedules import Event
from .settings import Iteration, Run, prepare
from .sparse_images import SparseImages


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
    progress: bool = True,
    on_batch: Callable[[SparseImages], None] | None = None,
    **settings,
) -> SparseImages:
    """Synthesise sparse images from a trained timm ViT, without data.

    The settings are those of `invert_batches`, and: output: a folder to which every finished batch is written at once, so that an interrupted run
    keeps it; force: replace the images in it. progress: show iteration, it/s, loss, active patches and time left on the terminal. on_batch: called
    with each finished batch, once it is written. Raises InputError for what cannot be done, RunError where a run fails.
    """
    from .storage import Writer

    run, on_iteration = prepare(model, **settings)
    writer = None if output is None else Writer(output, force=force)
    parts: list[SparseImages] = []
    try:
        with show_progress(on_iteration, run.provenance["method"], shown=progress) as report:
            for part in run_batches(run, report):
                parts.append(part)
                if writer is not None:
                    writer.add(part)
                if on_batch is not None:
                    on_batch(part)
    finally:
        if writer is not None:
            writer.close(complete=sum(map(len, parts)) == run.num_images)
    return SparseImages.cat(parts)


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
    flip, mean, std: facts of the training data, None: the model's own. dtype: "float32" or "float64". device: None: a GPU if there is one, else the
    model's.
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
            raise out_of_memory(run.vit, run.schedule, len(trajectories)) from error
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
    table = run.table.to(device)
    emitted: list[tuple[Tensor, Tensor]] = []
    for stage in run.schedule.stages():
        for t in range(stage.start, stage.stop):
            output, loss, grad = _gradient(run, images, index, table[t], labels)
            if not math.isfinite(loss):
                where = f"iteration {t} of trajectories {trajectories.start} to {trajectories.stop - 1}"
                raise RunError(f"the loss is {loss} at {where}: the run has diverged or a loss term is undefined there")
            if t == stage.stop - 1 and stage.event is not None:
                snapshot = ranking.Snapshot(images.clone(), index, labels, output.logits, output.attention, generators)
            step = torch.tensor(t + 1, device=device)
            image_step(images, grad, *moments, step, low, high, index, vit.patch_size, lr=run.lr, betas=run.betas)
            report(t, loss, stage.active, images, index, labels)
        if stage.event is not None:
            index, leaving = _split(run, stage.event, snapshot)
            if stage.event.fate == "emit":
                emitted.append((take_rows(to_patches(images, vit.patch_size), leaving), leaving))
    emitted.append((take_rows(to_patches(images, vit.patch_size), index), index))
    return _collect(run, trajectories, emitted)


def _gradient(run: Run, images: Tensor, index: Tensor, augmentation: Tensor, labels: Tensor) -> tuple[engine.Output, float, Tensor]:
    """Forward pass, loss, and gradient of the loss in the pixels."""
    pixels = images.detach().requires_grad_()
    attention_outputs = [] if any(map(needs_attention_outputs, run.losses)) else None
    wanted = {} if attention_outputs is None else {"attention_outputs": attention_outputs}
    output = engine.forward(run.vit, pixels, index, augmentation, **wanted)
    loss = total(run.losses, pixels, output.logits, labels, attention_outputs)
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
        raise InputError("every loss must return one number that depends on the images or the logits")
    (grad,) = torch.autograd.grad(loss, pixels)
    return output, float(loss.detach()), grad


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
