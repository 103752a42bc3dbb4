"""Images made until calibration has seen enough: until the ranges of the activations no longer widen.

A range of least and greatest values widens a little with almost every image, so that none stands still. Two figures tell whether they have settled
over the last WINDOW rounds: by how much ranges widened on average, and by how much the one that widened most.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..images.sparse_images import SparseImages
from ..inversion.loop import invert
from .calibrate import Calibration, Range
from .model import Images

ROUND = 8  # images
ITERATIONS = 20  # a two-hundredth of the published ones; more makes ranges of 8 bits no better (docs/quantization.md)
DIVISION = 4  # images per trajectory of PRI
WINDOW = 2  # rounds
FIRST_ROUNDS = 4  # by which a model is reparametrised, before calibration sees them
ON_AVERAGE, MOST_OF_ONE = 0.01, 0.15  # fractions of a range, over a window
MAX_IMAGES = 128

Source = Callable[[int], Images]  # the number of a round, from 0 -> its images


@dataclass(frozen=True)
class Round:
    """What calibration found in a round, for `on_round`."""

    number: int  # from 0
    images: int  # seen so far
    on_average: float | None  # fraction by which ranges widened over the last WINDOW rounds; None before
    most_of_one: float | None  # of the range that widened most
    widest: str | None  # its activation
    settled: bool


def inverting(model: nn.Module, seed: int = 0, **settings: Any) -> Source:
    """The source that makes images of a model itself: round k is a short run of PRI with seed + k. settings: of `smi.invert`."""

    def source(number: int) -> SparseImages:
        about = {"method": "pri", "division": DIVISION, "num_images": ROUND, "iterations": ITERATIONS, "progress": False}
        return invert(model, seed=seed + number, **{**about, **settings})

    return source


def after(first: Sequence[Images], source: Source) -> Source:
    """A source whose first rounds are made already."""
    return lambda number: first[number] if number < len(first) else source(number)


def calibrate_until_settled(
    calibration: Calibration, source: Source, *, max_images: int = MAX_IMAGES, on_round: Callable[[Round], None] | None = None
) -> dict[str, Any]:
    """Show rounds of images to a calibration until its ranges have settled, or `max_images` were seen; the last round as data."""
    seen: list[dict[str, Range]] = []
    while True:
        calibration.see(source(len(seen)))
        seen.append(calibration.ranges())
        at = _judge(seen, calibration.images)
        if on_round is not None:
            on_round(at)
        if at.settled or calibration.images >= max_images:
            return {"rounds": len(seen), **{name: value for name, value in asdict(at).items() if name != "number"}}


def _judge(seen: list[dict[str, Range]], images: int) -> Round:
    if len(seen) <= WINDOW:
        return Round(len(seen) - 1, images, None, None, None, False)
    before, now = seen[-1 - WINDOW], seen[-1]
    widened = {name: _widened(before[name], now[name]) for name in now}
    average, widest = sum(widened.values()) / len(widened), max(widened, key=lambda name: widened[name])
    return Round(len(seen) - 1, images, average, widened[widest], widest, average <= ON_AVERAGE and widened[widest] <= MOST_OF_ONE)


def _widened(before: Range, now: Range) -> float:
    """Which fraction of a range was not there before."""
    width = now[1] - now[0]
    return 1 - (before[1] - before[0]) / width if width else 0.0


def print_round(at: Round) -> None:
    """A line of progress on stderr."""
    told = ""
    if at.on_average is not None and at.most_of_one is not None:
        told = f"  ranges {at.on_average:.1%} wider than {WINDOW} rounds ago, {at.widest} {at.most_of_one:.0%}"
    print(f"calibration  {at.images} images{told}{'  settled' if at.settled else ''}", file=sys.stderr, flush=True)
