"""The page of a folder of `bench.evidence`: what each method's images cost and what they are worth."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..images.sparse_images import SparseImages
from ..images.storage import MANIFEST
from . import pictures, plots
from .evidence_data import Evidence, mean_curve, title
from .one_run import COLUMNS, OVERVIEW, Place, provenance_table
from .page import Figure, Pair, Part, Section, Table, number
from .published import Ours, published_tables

UNITS = {
    "seconds": ("seconds", 1.0, 1),
    "speedup": ("speed-up", 1.0, 2),
    "gflops": ("GFLOP per image", 1.0, 2),
    "flops_ratio": ("FLOPs, counted over predicted", 1.0, 3),
}
QUANTISED = {  # fractions, as those of the students
    "agreement": "teacher agrees", "full": "full precision", "w8a8": "W8/A8", "w4a8": "W4/A8", "w4a4": "W4/A4", "w4a3": "W4/A3", "w2a8": "W2/A8",
}  # fmt: skip
TRANSFER = {"copy": "student: copy", "small": "student: small", "trunk": "student: trunk"}
STUDENTS = {
    "copy": "a copy of the teacher with its last blocks re-initialised",
    "small": "a small untrained ViT",
    "trunk": "a linear probe on a trunk that was trained on other classes",
}


@dataclass(frozen=True)
class Group:
    """Columns that belong in one table and one plot."""

    name: str
    title: str
    columns: Mapping[str, str]
    note: str
    seen: str  # in the plot


GROUPS = (
    Group(
        "accuracy",
        "The teacher, asked and quantised, per cent",
        QUANTISED,
        "Its agreement is on the synthesised images, the rest on real test images.",
        "What the images are worth to the teacher: its agreement with their labels, and its accuracy on real test images once quantised with them.",
    ),
    Group(
        "students",
        "Students, per cent of the real test images",
        TRANSFER,
        f"The students are {', '.join(f'{words} ({name})' for name, words in STUDENTS.items())}.",
        "What the images are worth to a student: its accuracy on real test images.",
    ),
)


def summary(evidence: Evidence) -> str:
    """What was measured, in a sentence."""
    seeds = len(evidence.seeds)
    about = evidence.config
    return (
        f"What each method's images cost and what they are worth on {about.get('data', 'real data')}: {about.get('images', '?')} images by "
        f"{about.get('iterations', '?')} iterations, {seeds} seed{'s' if seeds > 1 else ''}."
    )


def sections(evidence: Evidence, place: Place) -> list[Section]:
    """The chapters of the page."""
    return [
        Section("Images", _images(evidence, place)),
        Section("Comparison", _comparison(evidence, place)),
        Section("Convergence", _convergence(evidence, place)),
        Section("Published figures beside ours", published_tables(_ours(evidence))),
        Section("Provenance", [provenance_table(evidence.config, "Everything that decided the figures")]),
    ]


def _images(evidence: Evidence, place: Place) -> list[Part]:
    """The first images of every method, of the first seed that has them."""
    rows = []
    for row, cells in evidence.cells.items():
        folders = [evidence.folder / f"seed{seed}" / row / "images" for seed in sorted(cells)]
        folder = next((path for path in folders if (path / MANIFEST).is_file()), None)
        if folder is not None:
            rows.append((title(row), pictures.variety(SparseImages.load(folder), COLUMNS)))
    if not rows:
        return []
    return [Figure(pictures.picture_grid(rows, place("overview")), OVERVIEW, "Synthesised images of every method, one method in each row")]


def _comparison(evidence: Evidence, place: Place) -> list[Part]:
    """A table of cost, one of the quantised teacher and one of the students, each with its plot."""
    spread = "mean ± standard deviation over seeds" if len(evidence.seeds) > 1 else "one seed"
    parts: list[Part] = [_table(evidence, f"Cost, {spread}", UNITS, ""), *_speedup(evidence, place)]
    for group in GROUPS:
        chosen = {column: words for column, words in group.columns.items() if any(_values(evidence, row, column) for row in evidence.cells)}
        if chosen:
            parts.append(_table(evidence, f"{group.title}, {spread}", chosen, group.note))
            parts.append(_accuracies(evidence, chosen, group.seen, place(group.name)))
    return parts


def _table(evidence: Evidence, caption: str, columns: Mapping, note: str) -> Table:
    chosen = {name: head for name, head in columns.items() if any(_values(evidence, row, name) for row in evidence.cells)}
    heads = [head if isinstance(head, str) else head[0] for head in chosen.values()]
    lines = [[title(row), *(_mean(name, _values(evidence, row, name)) for name in chosen)] for row in evidence.cells]
    return Table(caption, ["method", *heads], lines, " ".join(filter(None, [note, "A dash: not measured, or not yet."])))


def _speedup(evidence: Evidence, place: Place) -> list[Part]:
    timed = [row for row in evidence.cells if evidence.speedups(row)]
    if not timed:
        return []
    series: dict[str, list[float | None]] = {"measured": [statistics.mean(evidence.speedups(row)) for row in timed]}
    predicted = [_predicted(evidence, row) for row in timed]
    if any(value is not None for value in predicted):
        series["predicted by FLOPs"] = predicted
    path = plots.plot_bars([title(row) for row in timed], series, place("speedup"), label="finished images per second, dense = 1", suffix="×")
    caption = "How many finished images a method gives in the time of one dense image: measured, and as its FLOPs predict."
    return [Figure(path, caption, "Bars of speed over dense inversion for each method")]


def _accuracies(evidence: Evidence, columns: Mapping[str, str], caption: str, path: Path) -> Figure:
    """A plot of some columns; full precision is a dashed line."""
    full = [value for row in evidence.cells for value in evidence.values(row, "full")]
    levels = {"the teacher itself": statistics.mean(full)} if full else {}
    points = {head: [_point(evidence.values(row, name)) for row in evidence.cells] for name, head in columns.items() if name != "full"}
    plots.plot_fractions([title(row) for row in evidence.cells], points, levels, path)
    return Figure(path, caption, "Points for each method: " + ", ".join(points))


def _values(evidence: Evidence, row: str, column: str) -> list[float]:
    if column == "seconds" and row == "real":
        return []  # those of reading a file
    return evidence.speedups(row) if column == "speedup" else evidence.values(row, column)


def _mean(column: str, values: Sequence[float]) -> str:
    _, scale, digits = UNITS.get(column, ("", 100.0, 1))
    if not values:
        return number(None)
    spread = f" ± {statistics.stdev(values) * scale:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values) * scale:.{digits}f}{spread}"


def _point(values: Sequence[float]) -> tuple[float, float] | None:
    return (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


def _predicted(evidence: Evidence, row: str) -> float | None:
    dense, mine = (evidence.values(name, "gflops") if name in evidence.cells else [] for name in ("dense", row))
    return statistics.mean(dense) / statistics.mean(mine) if dense and mine else None


def _convergence(evidence: Evidence, place: Place) -> list[Part]:
    """Accuracy of each student against steps and against seconds."""
    parts: list[Part] = []
    for name, words in STUDENTS.items():
        drawn = []
        for axis, label in (("step", "step"), ("seconds", "seconds of training")):
            curves = [curve for row in evidence.cells if (curve := mean_curve(evidence, row, name, axis))]
            if curves:
                path = plots.plot_curves(curves, place(f"{name}-{axis}"), xlabel=label, ylabel="accuracy on real test images")
                caption = f"How {words} learns from each method's images, against {label}" + (
                    "; bands are the deviation over seeds." if any(curve.spread for curve in curves) else "."
                )
                drawn.append(Figure(path, caption, f"Learning curves of the student '{name}' against {label}, one line for each method"))
        parts += [Pair(drawn)] if drawn else []
    return parts or ["No learning curves were measured yet."]


def _ours(evidence: Evidence) -> Ours:
    rows, about = evidence.cells, evidence.config

    def mean_of(row: str, column: str) -> float | None:
        values = evidence.values(row, column)
        return statistics.mean(values) if values else None

    quantised = {row: (mean_of(row, "w4a8"), mean_of(row, "w8a8")) for row in rows if mean_of(row, "w8a8") is not None}
    transfer = {row: value for row in rows if (value := mean_of(row, "copy")) is not None}
    full = [value for row in rows for value in evidence.values(row, "full")]
    if full:
        quantised = {"full": (statistics.mean(full),) * 2, **quantised} if quantised else {}
        transfer = {"full": statistics.mean(full), **transfer} if transfer else {}
    predicted = {row: _predicted(evidence, row) for row in rows}
    teacher = Path(str(about.get("teacher", "?"))).name
    return Ours(
        model=f"{about.get('data', 'other')} data, the teacher '{teacher}' and {about.get('iterations', '?')} iterations",
        speedups={row: statistics.mean(evidence.speedups(row)) for row in rows if evidence.speedups(row)},
        predicted={row: value for row, value in predicted.items() if value is not None},
        quantised=quantised,
        transfer=transfer,
    )
