"""Published figures, and tables of them beside ours.

SMI: arXiv 2510.27186 (tables of throughput, quantisation and transfer); PRI: arXiv 2509.23235.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..inversion.methods import JUDGED, PRI2, PRI4, PRI7
from .page import Part, Table, factor, per_cent


@dataclass(frozen=True)
class Published:
    """A line of the SMI paper's table; the GPU and the batch are not named there."""

    model: str
    method: str
    its: float  # iterations per second
    gflops: float
    memory: float  # MB


PUBLISHED = (
    Published("DeiT-Tiny/16", "dense", 7.33, 414.20, 1118.69),
    Published("DeiT-Tiny/16", "smi", 18.82, 107.32, 476.32),
    Published("DeiT-Base/16", "dense", 1.19, 6475.63, 4096.96),
    Published("DeiT-Base/16", "smi", 4.51, 1578.97, 1516.64),
)
DENSE_ITS = {line.model: line.its for line in PUBLISHED if line.method == "dense"}
OVER_DENSE = {line.model: line.its / DENSE_ITS[line.model] for line in PUBLISHED if line.method == "smi"}
PRI_OVER_DENSE, PRI_OVER_SMI = "up to 10×", "2×"
QUANTISED = {  # top-1 on ImageNet in per cent: W4/A8, W8/A8
    "DeiT-Tiny": {"full": (72.14, 72.14), "gaussian": (7.80, 10.55), "psaq": (64.97, 70.54), "dense": (64.28, 70.27), "smi": (64.04, 70.13)},
    "DeiT-Base": {"full": (81.85, 81.85), "gaussian": (11.09, 14.72), "psaq": (76.73, 78.93), "dense": (75.99, 78.58), "smi": (77.51, 79.63)},
}
TRANSFER = {  # top-1 in per cent: CIFAR-10, CIFAR-100
    "DeiT-Tiny": {"full": (90.23, 71.66), "dense": (69.51, 70.32), "smi": (90.08, 70.48)},
    "DeiT-Base": {"full": (95.36, 79.41), "dense": (90.02, 74.88), "smi": (95.10, 74.53)},
}
TITLES = {"full": "the model itself", **{method.key: method.title for method in JUDGED}} | {"dense": "dense (DeepInversion)"}


@dataclass(frozen=True)
class Ours:
    """What was measured here, by method as in `TITLES`; accuracies as fractions."""

    model: str  # what the figures are of, in words
    speedups: Mapping[str, float]  # finished images per second over dense
    predicted: Mapping[str, float] = field(default_factory=dict)  # the same by FLOPs
    quantised: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)  # W4/A8, W8/A8
    transfer: Mapping[str, float] = field(default_factory=dict)


def published_tables(ours: Ours) -> list[Part]:
    """Speed, quantisation and transfer, published and ours, as far as ours were measured."""
    parts: list[Part] = [
        "The published figures are of other models, data and machines: DeiT at 224 px with ImageNet or CIFAR weights, 4000 iterations, a GPU that "
        f"the paper does not name. Ours are of {ours.model}. Ratios and the order of the methods can be set side by side, the figures "
        "themselves cannot.",
    ]
    if ours.speedups:
        parts.append(_speed(ours))
    if ours.quantised:
        parts.append(
            _accuracy("Accuracy of the quantised model, by the images it was calibrated with", QUANTISED, ("W4/A8", "W8/A8"), ours.quantised)
        )
    if ours.transfer:
        columns = ("CIFAR-10", "CIFAR-100")
        values = {name: (value,) for name, value in ours.transfer.items()}
        parts.append(_accuracy("Accuracy of a student, by the images it learned from", TRANSFER, columns, values, ("student",)))
    return parts


def _speed(ours: Ours) -> Table:
    rows = [["SMI over dense", *map(factor, OVER_DENSE.values()), factor(ours.speedups.get("smi")), factor(ours.predicted.get("smi"))]]
    for name in (PRI2.key, PRI4.key, PRI7.key):
        if name in ours.speedups:
            claim = PRI_OVER_DENSE if name == "pri7" else "–"
            rows.append([f"{TITLES[name]} over dense", claim, claim, factor(ours.speedups[name]), factor(ours.predicted.get(name))])
    if {"pri7", "smi"} <= ours.speedups.keys():
        ratios = [values["pri7"] / values["smi"] if {"pri7", "smi"} <= values.keys() else None for values in (ours.speedups, ours.predicted)]
        rows.append(["PRI v=7 over SMI", PRI_OVER_SMI, PRI_OVER_SMI, *map(factor, ratios)])
    columns = ["speed", *(f"published, {name}" for name in OVER_DENSE), "here, measured", "here, by FLOPs"]
    note = (
        "Published for SMI: iterations per second; for PRI: the claims of the paper, which name no division factor. Here: finished images per second."
    )
    return Table("Speed over dense inversion", columns, rows, note)


def _accuracy(caption: str, published: Mapping, columns: tuple[str, ...], ours: Mapping, here: tuple[str, ...] | None = None) -> Table:
    """Published models side by side, ours in the last columns; a row for each method that either has."""
    here = columns if here is None else here
    names = [name for name in TITLES if name in ours or any(name in rows for rows in published.values())]
    rows = []
    for name in names:
        theirs = [per_cent(value / 100, 2) for found in published.values() for value in found.get(name, (float("nan"),) * len(columns))]
        rows.append([TITLES[name], *theirs, *map(per_cent, ours.get(name, (None,) * len(here)))])
    heads = [f"{model}, {column}" for model in published for column in columns]
    note = "Of PRI the paper reports accuracy above SMI and near dense." if any(name.startswith("pri") for name in ours) else ""
    return Table(caption, ["images", *heads, *(f"here, {column}" for column in here)], rows, note)
