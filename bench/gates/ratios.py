"""Ratios: how many times faster our step is than the baselines', held against those of bench/baseline/ or of another commit.

Why the ratios are stable on a machine that does other work:
- both sides run in the same process in turn, so that what slows the machine slows both;
- processor time instead of wall time, in one thread: waiting for a processor does not count, nor do threads that spin while they wait for another;
- a sample is the smallest of a few calls, so that an interruption which emptied the caches does not count either;
- an objection needs the medians a threshold apart AND disjoint 20-80 % bands, and has to be repeated in a second, longer measurement.
What they cannot see: a loss of parallelism, or sleeping. The suites, which measure wall time with all threads, do.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from smi.console import print_table
from smi.engine.dtype import choose_dtype
from smi.files import write_json
from smi.kernels.timing import Quantiles, quantiles

from ..cases.suites import BASE, TINY, final_smi
from ..measuring.record import device_class, origin
from ..sides.make import build_model, make_step
from .another_commit import ratios_at

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
        dtype = str(choose_dtype(torch.device("cpu"))).removeprefix("torch.")
    steps = {side: make_step(side, model, case.batch, case.active, dtype=dtype, variant=variant) for side in ("ours", *others)}
    return Sides(steps, dtype, steps["compiled"].variant if "compiled" in steps else variant)


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

    slow: plants a regression: our side takes `slow` times as long.
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


def check_ratios(
    folder: Path, *, compiled: bool, update: bool = False, against: str | None = None, repetitions: int | None = None, slow: float = 1.0
) -> int:
    """Hold ours/eager and, if `compiled`, ours/compiled against the baseline of this class of processors; how many regressed.

    folder: of the baselines. update: record a baseline instead. against: take it from this commit, measured now. repetitions: check so often and
    count the alarms. slow: our side takes `slow` times as long.
    """
    torch.set_num_threads(1)
    path = folder / f"{device_class(torch.device('cpu'))}.json"
    if update:
        measured = measure_ratios({}, compiled, slow)
        write_json(path, origin() | {"cases": as_baseline(measured)})
        print(f"wrote {path}")
        show_ratios(verdicts(measured))
        return 0
    before = ratios_at(against) if against else json.loads(path.read_text())["cases"] if path.exists() else {}
    if not before:
        print(f"ratios: there is no baseline {path.name}, nothing to hold them against: --update records one, --against measures another commit")
    if repetitions:
        return count_alarms(before, compiled, slow, repetitions)
    found = verdicts(measure_ratios(before, compiled, slow))
    show_ratios(found)
    return sum(verdict.regressed for verdict in found)


def count_alarms(before: dict, compiled: bool, slow: float, repetitions: int) -> int:
    """How many of the repetitions of the check raised an alarm."""
    alarms = 0
    for number in range(1, repetitions + 1):
        found = verdicts(measure_ratios(before, compiled, slow))
        names = [verdict.name for verdict in found if verdict.regressed]
        alarms += bool(names)
        load = os.getloadavg()[0]
        ratios = ", ".join(f"{verdict.now.median:.2f}" for verdict in found)
        print(f"{number}/{repetitions}: load {load:.1f}, ratios {ratios}: {'ALARM ' + '; '.join(names) if names else 'no alarm'}", flush=True)
    print(f"{alarms} alarms in {repetitions} repetitions")
    return alarms


def measure_ratios(before: dict, compiled: bool, slow: float) -> dict[str, tuple[Sides, list[Verdict]]]:
    """For every case its sides and the verdict about each other side."""
    measured = {}
    for case in RATIO_CASES:
        old = before.get(case.name, {})
        others = tuple(other for other in case.others if compiled or other != "compiled")
        sides = sides_of(case, others, old.get("dtype", "auto"), old.get("variant"))
        found = []
        for other in others:
            band = old.get("over", {}).get(other)

            def sample(rounds: int, other=other, sides=sides) -> list[float]:
                return speedups(sides.steps["ours"], sides.steps[other], rounds, slow=slow)

            found.append(judge(f"{case.name}: {other}", sample, Quantiles(*band) if band else None))
        measured[case.name] = sides, found
    return measured


def verdicts(measured: dict) -> list[Verdict]:
    return [verdict for _, found in measured.values() for verdict in found]


def as_baseline(measured: dict) -> dict:
    """What a baseline file keeps of a measurement."""
    return {
        name: {
            "dtype": sides.dtype,
            "variant": sides.variant,
            "engine": sides.steps["ours"].resolved,
            "over": {verdict.name.rsplit(": ", 1)[1]: list(verdict.now) for verdict in found},
        }
        for name, (sides, found) in measured.items()
    }


def show_ratios(found: list[Verdict]) -> None:
    def band(quantiles: Quantiles | None) -> str:
        return f"{quantiles.median:.2f} ({quantiles.low:.2f}-{quantiles.high:.2f})" if quantiles else "-"

    rows = [[v.name, band(v.before), band(v.now), "REGRESSED" if v.regressed else "ok" if v.before else "new"] for v in found]
    print_table("times faster than the other side, processor time of one thread", ["step", "baseline", "now", ""], rows)
