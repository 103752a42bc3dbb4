"""What the suites found on one processor, case by case and method by method."""

from collections.abc import Sequence
from typing import NamedTuple

import timm
import torch

from smi.inversion.methods import Method
from smi.inversion.schedules import make_schedule
from smi.models.vit import ViT, describe

from ..cases.suites import BASE, ITERATIONS, PATCHES, SMALL, TINY

TITLES = {TINY: "DeiT-Tiny/16", SMALL: "DeiT-Small/16", BASE: "DeiT-Base/16"}


class Rate(NamedTuple):
    """How fast a method runs: iterations per second of a batch, finished images per second, how that was found, and the rows that say so."""

    iterations: float
    images: float
    batch: int
    how: str  # "whole runs", or "steps" of all stages
    rows: list[dict]


class Results:
    """Rows of the suites; the last where a case occurs twice."""

    def __init__(self, rows: Sequence[dict]):
        self.rows, self.about = rows, rows[-1]
        mine = [row for row in rows if "side" in row and row.get("suite") != "scaling"]
        self.found = {(row["kind"], row.get("case"), row["side"]): row for row in mine}

    @property
    def on(self) -> str:
        return "cuda" if "architecture" in self.about else "cpu"

    def get(self, kind: str, case: str, side: str) -> dict | None:
        row = self.found.get((kind, case, side))
        return None if row is None or "not_timed" in row or "not_measured" in row else row

    def whole(self, model: str, title: str, side: str) -> dict | None:
        rows = [
            row
            for (kind, _, s), row in self.found.items()
            if (kind, s, row.get("model"), row.get("method")) == ("whole", side, model, title) and "not_timed" not in row
        ]
        return rows[-1] if rows else None

    def steps(self, model: str, side: str) -> dict[int, dict]:
        """By active patches, at the one batch of the suite of steps."""
        chosen = [row for (kind, _, s), row in self.found.items() if (kind, s) == ("step", side) and "ms" in row and row["model"] == model]
        return {row["active"]: row for row in chosen if not row["options"]}

    def rate(self, model: str, method: Method, side: str) -> Rate | None:
        """From a whole run, or from the steps of all its stages; None where neither was measured."""
        row = self.whole(model, method.title, side)
        if row:
            return Rate(row["iterations_per_second"], row["images_per_second"][1], row["batch"], "whole runs", [row])
        steps, schedule = self.steps(model, side), make_schedule(method.name, PATCHES, ITERATIONS, **method.options)
        stages = list(schedule.stages())
        if any(stage.active not in steps for stage in stages):
            return None
        seconds = sum((stage.stop - stage.start) * steps[stage.active]["ms"][1] / 1e3 for stage in stages)
        its, batch = ITERATIONS / seconds, steps[PATCHES]["batch"]
        return Rate(its, its / ITERATIONS * batch * schedule.images_per_trajectory, batch, "steps", [steps[stage.active] for stage in stages])

    def images_per_second(self, model: str, method: Method, side: str) -> float | None:
        rate = self.rate(model, method, side)
        return rate and rate.images


def vit_of(model: str) -> ViT:
    with torch.device("meta"):
        return describe(timm.create_model(model))
