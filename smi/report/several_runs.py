"""The page of a folder that holds the images of several methods, such as `smi demo` writes, with its table."""

from collections.abc import Sequence
from pathlib import Path

from ..csrc.cache import json_of
from ..errors import InputError
from ..images.storage import MANIFEST
from . import one_run, pictures, plots
from .evidence_data import is_number
from .one_run import Place, Result
from .page import Details, Figure, Heading, Part, Section, Table, factor, number, per_cent
from .published import Ours, published_tables

DEMO = "demo.json"
FORMAT = "smi.demo/1"
LINES = 3  # of images of each method
SAME = 0.01  # fractions that differ by no more say nothing about the methods
FRACTIONS = {"agreement": "teacher agrees", "w8a8": "W8/A8", "w4a8": "W4/A8", "transfer": "student"}  # columns of the table
NUMBERS = ("seconds", "images_per_second", "flops_speedup", *FRACTIONS)  # of a row, where they are known


def image_folders(folder: Path) -> list[Path]:
    """Folders of images directly in a folder, by name."""
    return sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))


def read_demo(folder: Path) -> dict | None:
    """The table that the demo wrote, None where there is none; raises InputError where it cannot be read."""
    path = folder / DEMO
    if not path.is_file():
        return None
    try:
        found = json_of(path)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        _check(found)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as the demo's table: {error}") from error
    return found


def _check(demo: dict) -> None:
    """Raise ValueError where a part of the table is of another type than the page takes."""
    rows, settings = demo.get("table"), demo.get("settings", {})
    for name, kind in (("table", list), ("settings", dict), ("notes", list), ("downstream", dict | None)):
        if not isinstance(demo.get(name, kind() if isinstance(kind, type) else None), kind):
            raise ValueError(f"{name} is of another type")
    if not rows or not all(isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("method", "folder")) for row in rows):
        raise ValueError("a row names no method or folder")
    needed = [(row, ("sparsity", "images")) for row in rows] + [(settings, ("iterations", "batch_size", "tv_weight"))] * bool(settings)
    needed += [(row, ("speedup", "flops_speedup")) for row in rows if row.get("speedup") is not None]
    for values, names in needed:
        if not all(is_number(values.get(name)) for name in names):
            raise ValueError(f"{' or '.join(names)} is no number")
    numbers = [row.get(name) for row in rows for name in NUMBERS] + [demo.get("full")]
    if not all(number is None or is_number(number) for number in numbers) or not all(isinstance(note, str) for note in demo.get("notes", [])):
        raise ValueError("a figure is no number, or a note no text")


def sections(results: Sequence[tuple[Path, Result]], demo: dict | None, place: Place) -> list[Section]:
    """The chapters: what is compared, the published figures, then one for each method."""
    every = [result for _, result in results]
    made = [Section("Images", [overview(every, place)])]
    made.append(Section("Comparison", [_facts(every)] if demo is None else _comparison(demo, place)))
    if demo is not None:
        made.append(Section("Published figures beside ours", published_tables(_ours(demo))))
    made += [Section(result.name, _method(folder, result, place)) for folder, result in results]
    return [*made, Section("Provenance", _provenance(every, demo))]


def overview(results: Sequence[Result], place: Place, columns: int = one_run.COLUMNS) -> Figure:
    """The first images of every method."""
    rows = [(result.name, pictures.variety(result.images, columns)) for result in results]
    return Figure(pictures.picture_grid(rows, place("overview")), one_run.OVERVIEW, "Synthesised images of every method, one method in each row")


def _method(folder: Path, result: Result, place: Place) -> list[Part]:
    def own(name: str) -> Path:
        return place(f"{folder.name}-{name}")

    chapters = one_run.sections(result, own, LINES)[:-1]  # the provenances are at the end of the page
    inner = [part for chapter in chapters for part in (Heading(chapter.title), *chapter.parts)]
    return [one_run.summary(result), *inner]


def _provenance(results: Sequence[Result], demo: dict | None) -> list[Part]:
    parts: list[Part] = [Details(f"Provenance of {result.name}", [one_run.provenance_table(result.images.provenance)]) for result in results]
    if demo is not None and demo.get("downstream"):
        parts.append(one_run.provenance_table(demo["downstream"], "Quantisation and transfer"))
    return parts


def _facts(results: Sequence[Result]) -> Table:
    """What is known without the demo's table."""
    rows = []
    for result in results:
        cells = result.images.grid[0] * result.images.grid[1]
        agreement = None if result.found is None else result.found.teacher.agreement
        rows.append([result.name, str(len(result.images)), f"{result.images.index.shape[1]} of {cells}", str(result.stages), per_cent(agreement)])
    return Table("The folders of images", ["folder", "images", "patches each", "stages", "agree with their label"], rows)


def _comparison(demo: dict, place: Place) -> list[Part]:
    """The demo's table and its two plots."""
    table, settings = demo["table"], demo.get("settings", {})
    fractions = [name for name in FRACTIONS if any(row.get(name) is not None for row in table)]
    columns = ["method", "sparsity", "images", "seconds", "images/s", "speed-up", "FLOPs predict", *(FRACTIONS[name] for name in fractions)]
    rows = [
        [
            row["method"], per_cent(row["sparsity"], 0), str(row["images"]), number(row.get("seconds")), number(row.get("images_per_second")),
            factor(row.get("speedup")), factor(row.get("flops_speedup")), *(per_cent(row.get(name)) for name in fractions),
        ]
        for row in table
    ]  # fmt: skip
    caption = "The same number of images by every method"
    if settings:
        caption += ": {iterations} iterations, batches of {batch_size} trajectories, total variation by {tv_weight:g}, on {device}".format(**settings)
    parts: list[Part] = [Table(caption, columns, rows, " ".join([*demo.get("notes", []), *_alike(demo)]))]
    timed = [row for row in table if row.get("speedup") is not None]
    if timed:
        series = {"measured": [row["speedup"] for row in timed], "predicted by FLOPs": [row["flops_speedup"] for row in timed]}
        path = plots.plot_bars([row["method"] for row in timed], series, place("speedup"), label="finished images per second, dense = 1", suffix="×")
        caption = (
            "How many finished images a method gives in the time of one dense image: measured here, and what its FLOPs alone predict. "
            "The difference is work that does not shrink with the patches."
        )
        parts.append(Figure(path, caption, "Bars of speed over dense inversion, measured and predicted, for each method"))
    if fractions:
        points = {FRACTIONS[name]: [None if row.get(name) is None else (row[name], 0.0) for row in table] for name in fractions}
        levels = {} if demo.get("full") is None else {"the teacher itself": demo["full"]}
        path = plots.plot_fractions([row["method"] for row in table], points, levels, place("accuracy"))
        caption = (
            "What the images are worth: the fraction that the teacher assigns to their label, and on the real test images the accuracy of the "
            "teacher quantised with them and of a student that learned from them."
        )
        parts.append(Figure(path, caption, "Points of agreement, quantised accuracy and student accuracy for each method"))
    return parts


def _alike(demo: dict) -> list[str]:
    """A sentence where quantisation does not tell the methods apart."""
    found = [row[name] for row in demo["table"] for name in ("w8a8", "w4a8") if row.get(name) is not None]
    if not found or demo.get("full") is None or max(abs(value - demo["full"]) for value in found) > SAME:
        return []
    return [
        f"Quantised at these widths the teacher loses at most {per_cent(SAME, 0)}, whichever images calibrate it: that does not rank the methods."
    ]


def _ours(demo: dict) -> Ours:
    settings = demo.get("settings", {})
    rows = {row["folder"]: row for row in demo["table"]}
    quantised = {name: (row.get("w4a8"), row.get("w8a8")) for name, row in rows.items() if row.get("w8a8") is not None}
    full = demo.get("full")
    if quantised and full is not None:
        quantised["full"] = (full, full)
    transfer = {name: row["transfer"] for name, row in rows.items() if row.get("transfer") is not None}
    if transfer and full is not None:
        transfer["full"] = full
    return Ours(
        model=f"the embedded digits teacher (32 px, 64 patches, {settings.get('iterations', '?')} iterations) on this machine",
        speedups={name: row["speedup"] for name, row in rows.items() if row.get("speedup") is not None},
        predicted={name: row["flops_speedup"] for name, row in rows.items() if row.get("flops_speedup") is not None},
        quantised=quantised,
        transfer=transfer,
    )
