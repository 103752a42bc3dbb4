"""When a gate objects to a ratio or a time, so that a busy machine raises no alarm.

Why the ratios are stable on a machine that does other work:
- both sides run in the same process in turn, so that what slows the machine slows both;
- processor time instead of wall time, in one thread: waiting for a processor does not count, nor do threads that spin while they wait for another;
- a sample is the smallest of a few calls, so that an interruption which emptied the caches does not count either;
- an objection needs the medians a threshold apart AND disjoint 20-80 % bands, and has to be repeated in a second, longer measurement.
What they cannot see: a loss of parallelism, or sleeping. The suites, which measure wall time with all threads, do.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from smi.kernels.timing import Quantiles, quantiles

THRESHOLD = 1.15  # half way, in proportion, to the 30 % that must be caught
ROUNDS, MORE_ROUNDS = 9, 25  # of the first measurement, and of the one after a suspicion
CALLS = 3  # of which a sample is the smallest
LEAST_SECONDS = 0.02  # that a call takes; shorter ones are repeated


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
