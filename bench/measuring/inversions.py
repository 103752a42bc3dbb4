"""Measures steps and whole runs of our side and the baselines, in turn, within a time; gives rows for the result files."""

import torch
from torch import nn

from smi import cost
from smi.inversion import augmentation
from smi.inversion.schedules import make_schedule
from smi.kernels import timing
from smi.models.vit import ViT, describe

from ..cases.suites import ITERATIONS, StepCase, WholeCase
from ..sides import eager, ours
from ..sides.make import Step, build_model, make_step
from ..sides.step_inputs import make_inputs
from .budget import rounds_for, rounds_within, wall_seconds
from .ceilings import Ceilings
from .memory import peak_memory

LONG = 0.05  # seconds of a round
GPU_ROUNDS, REPLAYS = 10, 10  # on a GPU: rounds at most, replays of a graph between two events
LOSS_AGREES = 0.02  # of eager's first loss: bfloat16's rounding, and no more


def ready_sides(case: StepCase, model: nn.Module) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps of a case, each called once, which warms it up; and why the others are not timed. No timing where the first losses disagree."""
    torch._dynamo.reset()  # what is compiled is compiled for one shape; more than a few in a process and nothing would be
    steps, losses, refused = {}, {}, {}
    for side in case.sides:
        try:
            steps[side] = make_step(side, model, case.batch, case.active)
            losses[side] = float(steps[side]())
        except Exception as error:  # out of memory, no compiler, tiles that do not fit (no RuntimeError): reported, the others are still measured
            steps.pop(side, None)
            refused[side] = reason_of(error)
    wanted = losses.get("eager")
    for side, loss in losses.items():
        if wanted is not None and not abs(loss - wanted) <= LOSS_AGREES * abs(wanted):
            refused[side] = f"its first loss is {loss:.6f}, eager's {wanted:.6f}"
            del steps[side]
    return steps, refused


def reason_of(error: Exception) -> str:
    """In one line, for a row."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def measure_step(case: StepCase, device: torch.device, seconds: float, ceilings: dict[str, Ceilings]) -> list[dict]:
    """Rows of all sides of a step, rounds of the sides in turn."""
    model = build_model(case.model, dict(case.options), device)
    steps, refused = ready_sides(case, model)
    one_round = sum(wall_seconds(step, device) for step in steps.values())
    rounds = min(rounds_for(seconds, one_round), GPU_ROUNDS) if device.type == "cuda" else rounds_for(seconds, one_round)
    peaks = {side: peak_memory(step, device) for side, step in steps.items()} if device.type == "cuda" else {}
    once = (lambda: None) if device.type == "cpu" and one_round > LONG else None  # long steps need no repetitions, nor a call to find out how many
    calls = replays_of(steps) if device.type == "cuda" else None
    samples = timing.alternate(steps, device, rounds, before=once, calls=calls)
    vit = describe(model)
    active = vit.num_patches if case.active is None else case.active
    flops = case.batch * cost.step_flops(vit, active, cls_only=True)
    about = {"kind": "step", "case": case.name, "model": case.model, "options": dict(case.options), "batch": case.batch, "active": active}
    about |= {"tokens": active + vit.num_prefix, "image_size": list(vit.image_size), "depth": len(vit.blocks), "flops": flops, "rounds": rounds}
    rows = [about | step_row(side, steps[side], samples, flops, ceilings) | {"peak_bytes": peaks.get(side)} for side in steps]
    return rows + [about | {"side": side, "not_timed": reason} for side, reason in refused.items()]


def replays_of(steps: dict[str, Step]) -> dict[str, int]:
    """Steps of a sample on a GPU, by side: REPLAYS of a captured graph, one where each waits for the host anyway."""
    return {side: REPLAYS if "CUDA graph" in step.resolved else 1 for side, step in steps.items()}


def step_row(side: str, step, samples: dict[str, list[float]], flops: int, ceilings: dict[str, Ceilings]) -> dict:
    """What is said of one side: quantiles, rates, and by how much it is faster than the others round by round."""
    quantiles = timing.quantiles(samples[side])
    peak = ceilings[step.dtype].flops if step.dtype in ceilings else None
    faster = {f"over_{other}": over(samples, side, other) for other in samples if other != side}
    return {
        "side": side,
        "resolved": step.resolved,
        "dtype": step.dtype,
        "ms": [q * 1e3 for q in quantiles],
        "teraflops": flops / quantiles.median / 1e12,
        "share_of_products": flops / peak / quantiles.median if peak else None,
        **faster,
    }


def over(samples: dict[str, list[float]], side: str, other: str) -> list[float]:
    """Quantiles of how many times faster `side` is than `other` in the same round."""
    return list(timing.quantiles([b / a for a, b in zip(samples[side], samples[other], strict=True)]))


def run_whole(case: WholeCase, side: str, model: nn.Module, iterations: int) -> None:
    """One batch of trajectories from noise to its finished images."""
    vit = describe(model)
    schedule = make_schedule(case.method, vit.num_patches, iterations, **case.options)
    if side == "ours":
        images = case.batch * schedule.images_per_trajectory
        ours.invert(model, case.method, images, iterations, case.batch, device=str(vit.device), **case.options)
    else:
        inputs = make_inputs(vit, case.batch, vit.num_patches)
        table = augmentation.draw(iterations, vit.image_size, torch.Generator().manual_seed(0))
        eager.invert(model, schedule, inputs, table)


def extrapolate(seconds: dict[int, float], iterations: int) -> float:
    """Seconds of `iterations` by the line through two lengths; the measured time itself where that length was run."""
    if iterations in seconds:
        return seconds[iterations]
    (short, a), (long, b) = sorted(seconds.items())
    return b + max(0.0, b - a) / (long - short) * (iterations - long)


def measure_whole(case: WholeCase, device: torch.device, seconds: float, ceilings: dict[str, Ceilings]) -> list[dict]:
    """Rows of a whole run, the sides and lengths in turn."""
    model, refused = build_model(case.model, {}, device), {}
    in_full = case.lengths == (ITERATIONS,)
    for side in case.sides:  # warms up
        try:
            run_whole(case, side, model, 4 * (case.division or 1) if in_full else case.lengths[0])
        except Exception as error:  # as of a step: the other side is still measured
            refused[side] = reason_of(error)
    ready = [side for side in case.sides if side not in refused]
    runs = {(side, length): lambda side=side, length=length: run_whole(case, side, model, length) for side in ready for length in case.lengths}
    samples: dict[tuple, list[float]] = {key: [] for key in runs}
    for number in rounds_within(0 if in_full else seconds) if ready else ():
        for key in list(runs)[:: -1 if number % 2 else 1]:
            samples[key].append(wall_seconds(runs[key], device))
    vit = describe(model)
    dtypes, names = {"ours": ours.run_dtype(vit.device), "eager": "float32"}, {"ours": f"smi.invert, {ours.ENGINE}", "eager": "eager"}
    found = []
    for side in ready:
        mine = {length: samples[side, length] for length in case.lengths}
        peak = ceilings[dtypes[side]].flops if dtypes[side] in ceilings else None
        found.append(whole_row(case, side, mine, vit, peak) | {"dtype": dtypes[side], "resolved": f"{names[side]} {dtypes[side]}"})
    return found + [about_whole(case, side) | {"not_timed": reason} for side, reason in refused.items()]


def about_whole(case: WholeCase, side: str) -> dict:
    """What a row says of a whole run before it is measured."""
    return {
        "kind": "whole",
        "case": case.name,
        "model": case.model,
        "method": case.title,
        "side": side,
        "batch": case.batch,
        "images": case.images,
        "iterations": ITERATIONS,
        "timed_iterations": list(case.lengths),
        "rounds": 0,
        "extrapolated": case.lengths != (ITERATIONS,),
    }


def whole_row(case: WholeCase, side: str, samples: dict[int, list[float]], vit: ViT, peak: float | None) -> dict:
    """Finished images per second of a run of ITERATIONS, each round extrapolated by itself. peak: FLOP/s that GEMMs reach."""
    schedule = make_schedule(case.method, vit.num_patches, ITERATIONS, **case.options)
    flops = cost.image_flops(vit, schedule, cls_only=True)
    batches = -(-case.images // (schedule.images_per_trajectory * case.batch))
    whole = [batches * extrapolate(dict(zip(samples, one, strict=True)), ITERATIONS) for one in zip(*samples.values(), strict=True)]
    slow, median, fast = (case.images / q for q in reversed(timing.quantiles(whole)))
    return about_whole(case, side) | {
        "sparsity": schedule.sparsity,
        "rounds": len(whole),
        "seconds": list(timing.quantiles(whole)),
        "images_per_second": [slow, median, fast],
        "flops_per_image": flops,
        "share_of_products": flops * median / peak if peak else None,
        "iterations_per_second": ITERATIONS * batches / timing.quantiles(whole).median,
    }
