"""Tables of what `python -m bench.run` and `python -m bench.gpu` measure: steps, whole runs, memory, operations, verdicts."""

import math
from collections.abc import Sequence

from ..cases.suites import BASE, PATCHES, SMALL, TINY, final_smi
from .results import TITLES
from .rows import Measurement, current
from .table import Layout, Table, mebibytes, per_cent, three_digits

SIZES = (BASE, SMALL, TINY)
PATCH = 16  # pixels a side, of these models
USUAL = {"depth": 12, "image_size": [224, 224]}


def named(row: dict) -> str:
    """A step in words: "DeiT-Tiny, batch 8, 46 of 196 patches, depth 24"."""
    patches = math.prod(row.get("image_size", USUAL["image_size"])) // PATCH**2
    active = "all patches" if row["active"] in (None, patches) else f"{row['active']} of {patches} patches"
    depth = f"depth {row['depth']}" if row.get("depth", USUAL["depth"]) != USUAL["depth"] else ""
    pixels = f"{row['image_size'][0]} pixels" if row.get("image_size", USUAL["image_size"]) != USUAL["image_size"] else ""
    return ", ".join(filter(None, [short(row["model"]), f"batch {row['batch']}", active, depth, pixels]))


def is_key(row: dict) -> bool:
    """Whether a step is one of those that all sides are measured on: all patches, or what SMI retains."""
    return row["suite"] == "steps" and row["active"] in (final_smi(), PATCHES) and not row["options"]


def short(model: str) -> str:
    return TITLES.get(model, model).removesuffix("/16")


def by_size(measurement: Measurement) -> tuple:
    """Large models first, few patches first."""
    row = measurement.about
    patches = PATCHES if row["active"] is None else row["active"]
    return SIZES.index(row["model"]) if row["model"] in SIZES else len(SIZES), row["batch"], patches


def _over(row: dict, other: str) -> str:
    found = row.get(f"over_{other}")
    return f"{found[1]:.2f}x" if found else ""


def _ms(row: dict) -> str:
    return f"{row['ms'][1]:.0f}" if row else ""


def _step(step: Measurement) -> list[list[str]]:
    ours = step.side("ours")
    times = [_ms(step.side(side)) for side in ("eager", "compiled", "ours")]
    return [[named(step.about), *times, _over(ours, "eager"), _over(ours, "compiled"), per_cent(ours.get("share_of_products"))]]


STEP = Layout("Steps", ("step", "eager, ms", "compiled, ms", "ours, ms", "over eager", "over compiled", "fraction of GEMM peak"), _step)


def _whole(run: Measurement) -> list[list[str]]:
    ours, eager = run.side("ours"), run.side("eager")
    images = [f"{side['images_per_second'][1]:.4f}" if side else "" for side in (eager, ours)]
    over = f"{ours['images_per_second'][1] / eager['images_per_second'][1]:.2f}x" if ours and eager else ""
    timed = " and ".join(map(str, run.about["timed_iterations"]))
    title = f"{short(run.about['model'])} {run.about['method']}, batch {run.about['batch']}"
    return [[title, *images, over, per_cent(ours.get("share_of_products")), timed, str(run.about["rounds"])]]


WHOLE = Layout(
    "Whole runs",
    ("whole run", "eager, images/s", "ours, images/s", "over eager", "fraction of GEMM peak", "iterations timed", "rounds"),
    _whole,
)


def _memory(step: Measurement) -> list[list[str]]:
    eager, cells = step.side("eager"), []
    for key in ("kept_bytes", "peak_above_idle_bytes"):
        for row in (eager, step.side("ours"), step.side("recompute")):
            of_eager = f" ({per_cent(row[key] / eager[key])})" if row and eager and row is not eager else ""
            cells.append(f"{mebibytes(row[key])}{of_eager}" if row else "")
    return [[named(step.about), *cells]]


MEMORY = Layout(
    "Memory",
    ("step, MiB (of eager)", *(f"{what}: {side}" for what in ("saved activations", "peak above idle") for side in ("eager", "ours", "recompute"))),
    _memory,
)


def _case(case: Measurement) -> list[list[str]]:
    times = {row["side"]: (row["cold_us"] or row["warm_us"])[1] for row in case.rows if "not_timed" not in row}
    about, stock = case.about, times.get("stock")
    ours = times.get(about["resolved"]) if about["resolved"] != "stock" else None
    others = ", ".join(f"{side} {three_digits(us)}" for side, us in times.items() if side not in ("stock", about["resolved"]))
    over = f"{stock / ours:.2f}x" if stock and ours else ""
    cells = [three_digits(us) if us else "" for us in (stock, ours)]
    of_floor = per_cent(case.side(about["resolved"]).get("share_of_floor"))
    return [[f"{about['operation']}, {about['case']}", about["dtype"], about["resolved"], *cells, over, of_floor, others]]


CASE = Layout(
    "Operations",
    ("operation, forward and backward", "dtype", "version", "stock, µs", "version, µs", "over stock", "fraction of roofline", "others, µs"),
    _case,
)


def _verdict(verdict: Measurement) -> list[list[str]]:
    row = verdict.about
    speed = f"{row['speedup']:.2f}x" if row["outcome"] == "correct" else ""
    return [[f"{row['operation']} {row['function']}", row["version"], row["dtype"], row["size"], row["outcome"], speed]]


VERDICT = Layout("Verdicts", ("raw function", "version", "dtype", "sizes", "outcome", "over stock"), _verdict)


def _steps(rows: Sequence[dict], suite: str) -> list[Measurement]:
    return [step for step in current(rows, "step") if step.about["suite"] == suite]


def steps(rows: Sequence[dict]) -> list[Table]:
    """Dense steps and those of SMI's last stage, all sides."""
    return STEP.tables(sorted((step for step in _steps(rows, "steps") if is_key(step.about)), key=by_size))


def stages(rows: Sequence[dict]) -> list[Table]:
    """The steps of every stage of every method."""
    return STEP.tables(sorted(_steps(rows, "steps"), key=by_size))


def scaling(rows: Sequence[dict]) -> list[Table]:
    """Steps over batch, tokens, depth and resolution."""
    return STEP.tables(_steps(rows, "scaling"))


def whole_runs(rows: Sequence[dict]) -> list[Table]:
    """Finished images per second of whole runs."""
    return WHOLE.tables(current(rows, "whole"))


def memory(rows: Sequence[dict]) -> list[Table]:
    """Saved activations of a step, and the peak of its process."""
    return MEMORY.tables(sorted(current(rows, "memory"), key=by_size))


def operations(rows: Sequence[dict]) -> list[Table]:
    """Each operation beside stock PyTorch."""
    return CASE.tables(sorted(current(rows, "case"), key=lambda case: case.subject))


def verdicts(rows: Sequence[dict]) -> list[Table]:
    """Which versions were right and how fast, on each GPU; kernels/verified.json is made of those of committed code."""
    return VERDICT.tables(current(rows, "verdict"))
