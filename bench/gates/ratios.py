"""What the regression gates measure and when they object: exact numbers, and ratios that a busy machine does not move.

Why the ratios are stable on a machine that does other work:
- both sides run in the same process in turn, so that what slows the machine slows both;
- processor time instead of wall time, in one thread: waiting for a processor does not count, nor do threads that spin while they wait for another;
- a sample is the smallest of a few calls, so that an interruption which emptied the caches does not count either;
- an objection needs the medians a threshold apart AND disjoint 20-80 % bands, and has to be repeated in a second, longer measurement.
What they cannot see: a loss of parallelism, or sleeping. The suites, which measure wall time with all threads, do.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import timm
import torch

from smi import cost
from smi.inversion.schedules import make_schedule
from smi.kernels.timing import Quantiles, quantiles
from smi.models.vit import describe

from ..cases.suites import BASE, ITERATIONS, METHODS, TINY, final_smi
from ..sides import eager, ours
from ..sides.fast_dtype import fast_dtype
from ..sides.make import build_model, make_step

THRESHOLD = 1.15  # half way, in proportion, to the 30 % that must be caught
ROUNDS, MORE_ROUNDS = 9, 25  # of the first measurement, and of the one after a suspicion
CALLS = 3  # of which a sample is the smallest
LEAST_SECONDS = 0.02  # that a call takes; shorter ones are repeated


@dataclass(frozen=True)
class RatioCase:
    """A step small enough for a gate: `depth` blocks of a model."""

    model: str
    depth: int
    batch: int
    active: int | None
    others: tuple[str, ...] = ("eager",)

    @property
    def name(self) -> str:
        model = self.model.replace("_patch16_224", "").replace("_", "-")
        return f"{model} of {self.depth} blocks, batch {self.batch}, {'all' if self.active is None else self.active} patches"


RATIO_CASES = (
    RatioCase(TINY, 2, 4, final_smi(), ("eager", "compiled")),
    RatioCase(TINY, 2, 2, None),
    RatioCase(BASE, 1, 2, final_smi()),
)


class Verdict(NamedTuple):
    """A ratio now and in the baseline; `before` is None where there is none."""

    name: str
    now: Quantiles
    before: Quantiles | None
    regressed: bool


def seconds(run: Callable[[], object], calls: int, repeats: int, clock: Callable[[], float]) -> float:
    """The smallest of a few samples of `repeats` calls each, per call."""
    best = float("inf")
    for _ in range(calls):
        began = clock()
        for _ in range(repeats):
            run()
        best = min(best, clock() - began)
    return best / repeats


def speedups(
    mine: Callable[[], object], other: Callable[[], object], rounds: int, clock: Callable[[], float] = time.process_time, slow: float = 1.0
) -> list[float]:
    """How many times faster `mine` is than `other`, round by round, who goes first alternating.

    slow: plants a regression, our side then works so many times as long.
    """
    mine = slowed(mine, slow, clock) if slow > 1 else mine
    runs = (mine, other)
    repeats = []
    for run in runs:
        run()
        repeats.append(max(1, round(LEAST_SECONDS / max(seconds(run, 1, 1, clock), 1e-6))))
    ratios = []
    for i in range(rounds):
        taken = {}
        for place in ((0, 1), (1, 0))[i % 2]:
            taken[place] = seconds(runs[place], CALLS, repeats[place], clock)
        ratios.append(taken[1] / taken[0])
    return ratios


def slowed(run: Callable[[], object], slow: float, clock: Callable[[], float]) -> Callable[[], None]:
    """`run`, followed by useless work for (slow - 1) times as long."""

    def longer() -> None:
        began = clock()
        run()
        end = began + slow * (clock() - began)
        while clock() < end:
            sum(range(100))

    return longer


def regressed(now: Quantiles, before: Quantiles, threshold: float = THRESHOLD) -> bool:
    """Whether a speed-up fell: the median by the threshold, and the bands apart."""
    return now.median * threshold < before.median and now.high < before.low


def slower(now: Quantiles, before: Quantiles, threshold: float = THRESHOLD) -> bool:
    """The same for times, which rise."""
    return now.median > threshold * before.median and now.low > before.high


def judge(name: str, sample: Callable[[int], list[float]], before: Quantiles | None) -> Verdict:
    """Measure by `sample(rounds)`; where that looks like a regression measure again, longer, and believe the second."""
    now = quantiles(sample(ROUNDS))
    if before is not None and regressed(now, before):
        now = quantiles(sample(MORE_ROUNDS))
    return Verdict(name, now, before, before is not None and regressed(now, before))


class Sides(NamedTuple):
    """The steps of a ratio case, and what a repetition must be told to run the same: the dtype, and which variant `compiled` is."""

    steps: dict[str, Callable]
    dtype: str
    variant: str | None


def sides_of(case: RatioCase, others: tuple[str, ...], dtype: str = "auto", variant: str | None = None) -> Sides:
    """Our step and the others' of a case. dtype, variant: those of the baseline, so that a choice by measurement cannot flip."""
    torch._dynamo.reset()
    model = build_model(case.model, {"depth": case.depth}, torch.device("cpu"))
    if dtype == "auto":
        dtype = str(fast_dtype(torch.device("cpu"))).removeprefix("torch.")
    steps = {side: make_step(side, model, case.batch, case.active, dtype=dtype, variant=variant) for side in ("ours", *others)}
    return Sides(steps, dtype, steps["compiled"].variant if "compiled" in steps else variant)


def exact_flops() -> dict[str, int | float]:
    """Counts of smi/cost.py on a fixed list of cases; no weights are made."""
    found: dict[str, int | float] = {}
    for name in (TINY, BASE):
        with torch.device("meta"):
            vit = describe(timm.create_model(name))
        short = name.removesuffix("_patch16_224")
        for active in (vit.num_patches, final_smi()):
            found[f"{short} step, {active} patches"] = cost.step_flops(vit, active)
            found[f"{short} step, {active} patches, CLS-only last block"] = cost.step_flops(vit, active, cls_only=True)
        for method, options in METHODS:
            schedule = make_schedule(method, vit.num_patches, ITERATIONS, **options)
            title = " ".join([method, *(f"v={v}" for v in options.values())])
            found[f"{short} {title}, whole trajectory"] = cost.trajectory_flops(vit, schedule, cls_only=True)
            found[f"{short} {title}, GFLOP by the published rule"] = round(cost.published_gflops(vit, schedule), 2)
    return found


def exact_kept_bytes() -> dict[str, int]:
    """Bytes that one forward pass keeps for backward: eager, and every engine in both dtypes, by what it runs in, which depends on the machine."""
    found = {}
    model = build_model(TINY, {"depth": 2}, torch.device("cpu"))
    engines = dict.fromkeys(("reference", ours.ENGINE))
    for active in (None, final_smi()):
        count = describe(model).num_patches if active is None else active
        where = f"deit_tiny of 2 blocks, batch 2, {count} patches"
        found[f"eager, {where}"] = eager.eager_step(model, 2, count).kept_bytes()
        for engine in engines:
            for dtype in ("float32", "bfloat16"):
                step = ours.make_step(model, 2, count, engine=engine, dtype=dtype)
                found[f"{step.resolved}, {where}"] = step.kept_bytes()
    return found
