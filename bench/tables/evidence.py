"""Tables of `python -m bench.evidence`: what each method's images cost, and what they are worth."""

import statistics
from collections.abc import Callable, Sequence

from smi.inversion.methods import GAUSSIAN, JUDGED, PSAQ, REAL
from smi.report.published import QUANTISED as PUBLISHED_TOP1_OF

from ..evidence.columns import DEFAULT_COLUMNS, FEW_BITS, HEADINGS, PUBLISHED_QUANTISED, QUANTISED
from .rows import Measurement, current
from .table import Layout, Table, three_digits

TITLES = {method.key: method.title for method in JUDGED}
PUBLISHED_TOP1 = PUBLISHED_TOP1_OF["DeiT-Tiny"]
CONTROLS = (GAUSSIAN.key, PSAQ.key, REAL.key)  # which do not depend on the weight of total variation
Cell = Callable[[list[float]], str]


def of_images(values: list[float]) -> str:
    """Mean and deviation over seeds, in per cent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def mean_of_images(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f}"


def seconds(values: list[float], form: Callable[[float], str] = three_digits) -> str:
    """Of the processor; nothing where they are too few to be counted, as for real images."""
    mean = statistics.mean(values)
    if mean < 1:
        return f"{mean:.1f}" if mean >= 0.05 else ""
    decimals = len(form(mean).partition(".")[2])
    spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{form(mean)}{spread}"


def whole_seconds(values: list[float]) -> str:
    return seconds(values, "{:.0f}".format)


def speedup(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}x"


COST: dict[str, tuple[str, Cell]] = {"core-seconds": ("seconds", seconds), "over dense": ("speedup", speedup)}
STUDENTS: dict[str, tuple[str, Cell]] = {name: (name, of_images) for name in ("copy", "small", "trunk")}
DIGITS = {**COST, "teacher agrees": ("agreement", of_images), "W4/A8": ("w4a8", mean_of_images), "W4/A3": ("w4a3", of_images), **STUDENTS}
CIFAR10 = {name: column for name, column in DIGITS.items() if name not in ("small", "trunk")} | {"core-seconds": ("seconds", whole_seconds)}
OTHER_WEIGHT = {"agrees, a_tv {}": "agreement", "W4/A3, {}": "w4a3", "copy, {}": "copy"}
EVERY = {name: column for name, column in DIGITS.items() if name not in ("W4/A8", "W4/A3", *STUDENTS)}
EVERY |= {HEADINGS[name]: (name, of_images) for name in DEFAULT_COLUMNS if name not in ("agreement", *STUDENTS)} | STUDENTS


def cells(row: dict, columns: dict[str, tuple[str, Cell]]) -> list[str]:
    return [form(row[key]) if key in row else "" for key, form in columns.values()]


def _every(measurement: Measurement) -> list[list[str]]:
    setting = "{data}, a_tv {tv_weight:g}".format(**measurement.about["config"])
    return [[f"{setting}: {TITLES[row['method']]}", *cells(row, EVERY)] for row in measurement.rows]


EVIDENCE = Layout("Evidence", ("images", *EVERY), _every)


def _of(rows: Sequence[dict], data: str) -> list[Measurement]:
    return [found for found in current(rows, "evidence") if found.about["config"]["data"] == data]


def digits(rows: Sequence[dict]) -> list[Table]:
    """What each method's images cost and are worth, on the digits."""
    found = _of(rows, "digits")[-1:]
    lines = [[TITLES[row["method"]], *cells(row, DIGITS)] for measurement in found for row in measurement.rows]
    return [Table(["images", *DIGITS], lines, [row for measurement in found for row in measurement.rows])]


def cifar10(rows: Sequence[dict]) -> list[Table]:
    """The same on CIFAR-10, at the lowest weight of total variation, with some columns at the higher ones."""
    first, *others = sorted(_of(rows, "cifar10"), key=lambda found: found.subject) or [None]
    if first is None:
        return []
    lines = [[TITLES[row["method"]], *cells(row, CIFAR10)] for row in first.rows]
    columns = ["images", *CIFAR10]
    for other in others:
        weight = _short(other.about["config"]["tv_weight"])
        columns += [name.format(weight) for name in OTHER_WEIGHT]
        by_method = {row["method"]: row for row in other.rows if row["method"] not in CONTROLS}
        for line, row in zip(lines, first.rows, strict=True):
            mine = by_method.get(row["method"], {})
            line += [of_images(mine[key]) if key in mine else "" for key in OTHER_WEIGHT.values()]
    return [Table(columns, lines, [row for found in (first, *others) for row in found.rows])]


def _short(weight: float) -> str:
    """5e-3"""
    mantissa, exponent = f"{weight:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def every(rows: Sequence[dict]) -> list[Table]:
    """All columns of all evidence but that of ImageNet, whose tables show all of it."""
    return EVIDENCE.tables(found for found in current(rows, "evidence") if found.about["config"]["data"] != "imagenet")


# ImageNet: under both recipes, with intervals over the test images


def imagenet(rows: Sequence[dict]) -> list[Table]:
    """Cost and accuracies with their 95 % intervals, one table for each number of iterations."""
    return [_imagenet(found, _accuracy, IMAGENET_COST) for found in imagenets(rows)]


def imagenet_paired(rows: Sequence[dict]) -> list[Table]:
    """Accuracy minus that of the row of real images, with its 95 % interval and p-value, image by image."""
    return [_imagenet(found, _difference, {}, without=REAL.key) for found in imagenets(rows)]


def imagenet_published(rows: Sequence[dict]) -> list[Table]:
    """Differences to full precision, the SMI paper's DeiT-Tiny beside ours."""
    return [_beside_published(found) for found in imagenets(rows)]


IMAGENET_COST: dict[str, tuple[str, Cell]] = {"core-seconds": ("seconds", whole_seconds), "over dense": COST["over dense"]}
IMAGENET_COST["teacher agrees"] = ("agreement", mean_of_images)
ON_IMAGENET = [name for recipe in (PUBLISHED_QUANTISED, QUANTISED, FEW_BITS) for name in recipe]


def imagenets(rows: Sequence[dict]) -> list[Measurement]:
    """The current rows of ImageNet's evidence, fewest iterations first."""
    return sorted(_of(rows, "imagenet"), key=lambda found: found.about["config"]["iterations"])


def _imagenet(found: Measurement, cell: Callable[[dict, str], str], cost: dict[str, tuple[str, Cell]], without: str | None = None) -> Table:
    """A line for each method; columns that no row has are left out."""
    named = [name for name in ON_IMAGENET if any(cell(row, name) for row in found.rows)]
    lines = [
        [TITLES[row["method"]], *cells(row, cost), *(cell(row, name) for name in named)] for row in found.rows if row["method"] != without
    ]  # fmt: skip
    about = found.about["config"]
    measured = f"{about['iterations']} iterations, {about['images']} images, {_seeds(len(found.about['full']))}"
    title = f"{measured}, full precision {_accuracy(found.about, 'full')}"
    return Table(["images", *cost, *(_heading(found, name) for name in named)], lines, found.rows, title)


def _heading(found: Measurement, name: str) -> str:
    """A column's, with the number of seeds where it is known for fewer than the others."""
    count = min(len(row[name]) for row in found.rows if name in row)
    return HEADINGS[name] + (f" ({_seeds(count)})" if count < len(found.about["full"]) else "")


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _accuracy(row: dict, name: str) -> str:
    return f"{mean_of_images(row[name])} ± {100 * row['interval'][name]:.1f}" if name in row else ""


def _difference(row: dict, name: str) -> str:
    if name not in row.get("paired", {}):
        return ""
    difference, half, p = row["paired"][name]
    return f"{100 * difference:+.1f} ± {100 * half:.1f} (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})"


def _beside_published(found: Measurement) -> Table:
    full, lines = PUBLISHED_TOP1["full"], []
    for row in found.rows:
        theirs, line = PUBLISHED_TOP1.get(row["method"]), [TITLES[row["method"]]]
        for i, name in ((1, "published_w8a8"), (0, "published_w4a8")):
            line.append("" if theirs is None else f"{theirs[i] - full[i]:+.1f}")
            line.append(f"{100 * (statistics.mean(row[name]) - statistics.mean(row['full'])):+.1f}" if name in row else "")
        lines.append(line)
    columns = ["images", "W8/A8, paper", "W8/A8, ours", "W4/A8, paper", "W4/A8, ours"]
    return Table(columns, lines, found.rows, f"{found.about['config']['iterations']} iterations")
