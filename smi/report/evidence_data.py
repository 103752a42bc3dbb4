"""What a folder of `bench.evidence` holds: FOLDER/config.json and FOLDER/seedN/ROW/cell.json, whatever part of it is there yet.

A cell is an object of columns, numbers, and of learning curves, NAME_curve: rows of step, seconds and accuracy.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..inversion.methods import JUDGED
from .plots import Curve

CONFIG, CELL = "config.json", "cell.json"
METHODS = {method.key: method for method in JUDGED}


@dataclass(frozen=True)
class Evidence:
    """What is known: cells[row][seed], a row being a method."""

    config: dict
    cells: dict[str, dict[int, dict]]
    folder: Path

    @property
    def seeds(self) -> list[int]:
        """All seeds of which there is a cell, ascending."""
        return sorted({seed for found in self.cells.values() for seed in found})

    def values(self, row: str, column: str) -> list[float]:
        """One number for each seed that has it."""
        return [cell[column] for _, cell in sorted(self.cells[row].items()) if isinstance(cell.get(column), int | float)]

    def speedups(self, row: str) -> list[float]:
        """Over dense, seed by seed."""
        dense = self.cells.get("dense", {})
        pairs = [(dense[seed].get("seconds"), cell.get("seconds")) for seed, cell in sorted(self.cells[row].items()) if seed in dense]
        return [] if row in METHODS and not METHODS[row].optimised else [of_dense / mine for of_dense, mine in pairs if of_dense and mine]


def is_evidence(folder: Path) -> bool:
    """Whether `bench.evidence` wrote a folder, and at least one cell of it is there."""
    return (folder / CONFIG).is_file() and any(folder.glob(f"seed*/*/{CELL}"))


def read_evidence(folder: Path) -> Evidence:
    """Every cell that is there; raises InputError where one cannot be read."""
    cells: dict[str, dict[int, dict]] = {}
    config = _json(folder / CONFIG)
    for path in sorted(folder.glob(f"seed*/*/{CELL}")):
        seed = path.parents[1].name.removeprefix("seed")
        if seed.isdecimal():
            cells.setdefault(path.parent.name, {})[int(seed)] = _json(path)
    order = [name for name in METHODS if name in cells] + sorted(cells.keys() - METHODS.keys())
    return Evidence(config, {name: cells[name] for name in order}, folder)


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object")
    return found


def title(row: str) -> str:
    """What a row is called in tables and plots."""
    return METHODS[row].title if row in METHODS else row


def mean_curve(evidence: Evidence, row: str, student: str, axis: str) -> Curve | None:
    """Mean over seeds of a learning curve, at the points that every seed has."""
    curves = [cell.get(f"{student}_curve") for _, cell in sorted(evidence.cells[row].items())]
    curves = [curve for curve in curves if curve and all(point.get(axis) is not None and point.get("accuracy") is not None for point in curve)]
    if not curves:
        return None
    points = list(zip(*curves, strict=False))
    x = [statistics.mean(point[axis] for point in same) for same in points]
    y = [[point["accuracy"] for point in same] for same in points]
    spread = [statistics.stdev(values) for values in y] if len(curves) > 1 else None
    return Curve(title(row), x, [statistics.mean(values) for values in y], spread)
