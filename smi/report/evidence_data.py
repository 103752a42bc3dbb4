"""What a folder of `bench.evidence` holds: FOLDER/config.json and FOLDER/seedN/ROW/cell.json, whatever part of it is there yet.

A cell is an object of columns, numbers, and of learning curves, NAME_curve: rows of step, seconds and accuracy.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..csrc.cache import json_of
from ..errors import InputError
from ..inversion.methods import JUDGED
from .plots import Curve

CONFIG, CELL = "config.json", "cell.json"
MOST = 1e18  # of a number that is drawn
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
            cells.setdefault(path.parent.name, {})[int(seed)] = _cell(path)
    order = [name for name in METHODS if name in cells] + sorted(cells.keys() - METHODS.keys())
    return Evidence(config, {name: cells[name] for name in order}, folder)


def _json(path: Path) -> dict:
    try:
        found = json_of(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object")
    return found


def _cell(path: Path) -> dict:
    """A cell; raises InputError where a column is neither a number nor a learning curve."""
    found = _json(path)
    for name, value in found.items():
        if not (_is_curve(value) if name.endswith("_curve") else value is None or is_number(value)):
            raise InputError(f"{path} is damaged: {name} is no {'learning curve' if name.endswith('_curve') else 'number'}")
    return found


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) and all(v is None or is_number(v) for v in row.values()) for row in value)


def is_number(value: Any) -> bool:
    """Whether a value of JSON can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST <= value <= MOST


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
