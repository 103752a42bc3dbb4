"""The published tables: published, baseline here, ours here, each made of the `Results` of one processor; and bench/results/paper.md, which holds
those of one device and names the command it is made by."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from smi import cost
from smi.errors import InputError
from smi.inversion.methods import COMPARED, DENSE, PRI7, SMI, Method
from smi.inversion.schedules import make_schedule
from smi.report.published import DENSE_ITS, PRI_OVER_DENSE, PRI_OVER_SMI, PUBLISHED, Published

from ..cases import suites
from ..cases.suites import BASE, ITERATIONS, TINY
from ..measuring import record
from .markdown import table_lines
from .results import TITLES, Rate, Results, vit_of
from .rows import current, processor
from .table import MISSING, Table, ratio

MODELS = {title: model for model, title in TITLES.items()}
CLAIMS = (f"{PRI_OVER_DENSE} over dense", f"{PRI_OVER_SMI} over SMI")
ANY_BATCH = range(1, 1025)
ABOUT = ("device", "device_class", "threads", "torch", "triton", "timm", "python", "time", "commit", "dirty")
MADE_BY = re.compile(r"`python -m bench\.paper --device (?P<device>[\w-]+)(?P<all> --all-runs)?`")
PICTURES = ("speedup", "tokens")


@dataclass(frozen=True)
class Goal:
    """The least that a step of ours is to be faster than another side."""

    case: str
    other: str
    least: float


GOALS = {
    "cpu": (
        Goal(suites.StepCase(BASE, 4, suites.final_smi()).name, "eager", 3.3),
        Goal(suites.StepCase(TINY, 8, suites.final_smi()).name, "eager", 3.5),
        Goal(suites.StepCase(BASE, 4).name, "eager", 2.9),
    ),
    "cuda": tuple(
        Goal(suites.StepCase(BASE, 128, active).name, other, least)
        for active in (None, suites.final_smi())
        for other, least in (("eager", 20.0), ("compiled", 1.5))
    ),
}
WHOLE_GOAL = {"cpu": 30.0, "cuda": 100.0}  # PRI v=7 of ours over dense eager, DeiT-Base, finished images per second


def paper_tables(results: Results) -> list[Table]:
    return [throughput(results), flops(results), memory(results), rebirth(results), goals(results)]


def method_of(line: Published) -> Method:
    return next(method for method in COMPARED if method.name == line.method)


def _rows(rates: Iterable[Rate | None]) -> list[dict]:
    return [row for rate in rates if rate for row in rate.rows]


def throughput(results: Results) -> Table:
    """Iterations per second, and SMI over dense."""
    lines, read = [], []
    for line in PUBLISHED:
        model, method = MODELS[line.model], method_of(line)
        here = {side: results.rate(model, method, side) for side in ("eager", "ours")}
        dense = {side: results.rate(model, DENSE, side) for side in here}
        cells = [f"{line.its:.2f} ({line.its / DENSE_ITS[line.model]:.2f}x)"]
        for side, rate in here.items():
            gain = ratio(rate and rate.iterations, dense[side] and dense[side].iterations)
            cells.append(f"{rate.iterations:.3f} ({gain}), batch {rate.batch}, {rate.how}" if rate else MISSING)
        work = {side: rate and rate.iterations * rate.batch for side, rate in here.items()}
        lines.append([f"{line.model} {method.title}", *cells, ratio(work["ours"], work["eager"])])
        read += _rows((*here.values(), *dense.values()))
    columns = ["iterations per second (over dense)", "published", "baseline here: eager", "ours here", "ours over eager, same work"]
    return Table(columns, lines, read, "Throughput")


def flops(results: Results) -> Table:
    """The published count beside ours; nothing of it is measured."""
    lines = []
    for line in PUBLISHED:
        vit, method = vit_of(MODELS[line.model]), method_of(line)
        schedule = make_schedule(method.name, vit.num_patches, ITERATIONS, **method.options)
        last = cost.step_flops(vit, schedule.patches_per_image, cls_only=True)
        mean = cost.trajectory_flops(vit, schedule, cls_only=True) / ITERATIONS
        cells = [f"{line.gflops:.2f}", f"{cost.published_gflops(vit, schedule):.2f}", f"{last / 1e9:.2f}", f"{mean / 1e9:.2f}"]
        lines.append([f"{line.model} {method.title}", *cells])
    columns = ["GFLOP", "published, its own rule", "that rule here", "ours per image and step, last stage", "ours, mean of the run"]
    title = "FLOPs (the published rule counts a batch of 128 and weight gradients, and leaves out attention's two batched GEMMs)"
    return Table(columns, lines, title=title)


def memory(results: Results) -> Table:
    """Saved activations, and peak of a process, at whatever batch was measured."""
    lines, read = [], []
    for line in PUBLISHED:
        method, active = method_of(line), None if line.method == "dense" else suites.final_smi()
        names = {suites.StepCase(MODELS[line.model], batch, active).name for batch in ANY_BATCH}
        case = next((case for kind, case, side in results.found if (kind, side) == ("memory", "ours") and case in names), None)
        found = {side: results.get("memory", case, side) if case else None for side in ("eager", "ours", "recompute")}
        cells = [f"{line.memory:.0f} MB", *map(_bytes, found.values()), *(_of(found[side], found["eager"]) for side in ("ours", "recompute"))]
        lines.append([f"{line.model} {method.title}", *cells])
        read += filter(None, found.values())
    columns = ["saved activations / peak above idle", "published: on the GPU", "baseline here: eager", "ours here", "ours, recompute"]
    return Table([*columns, "ours of eager", "recompute of eager"], lines, read, "Memory (the published batch is not named)")


def _bytes(row: dict | None) -> str:
    return f"{row['kept_bytes'] / 1e6:.0f} / {row['peak_above_idle_bytes'] / 1e6:.0f} MB, batch {row['batch']}" if row else MISSING


def _of(row: dict | None, other: dict | None) -> str:
    return " / ".join(f"{row[key] / other[key]:.0%}" for key in ("kept_bytes", "peak_above_idle_bytes")) if row and other else MISSING


def rebirth(results: Results) -> Table:
    """Finished images per second of every method and side."""
    lines, read = [], []
    for model in (TINY, BASE):
        rates = {(method, side): results.rate(model, method, side) for method in COMPARED for side in ("eager", "ours")}
        images = {key: rate and rate.images for key, rate in rates.items()}
        others = [images[DENSE, "ours"], images[SMI, "ours"], images[DENSE, "eager"]]
        for method in COMPARED:
            here = [images[method, side] for side in ("eager", "ours")]
            claim = ", ".join(CLAIMS) if method == PRI7 else ""
            cells = [f"{value:.5f}" if value else MISSING for value in here]
            lines.append([f"{TITLES[model]} {method.title}", claim, *cells, *(ratio(here[1], other) for other in others)])
        read += _rows(rates.values())
    columns = ["finished images per second", "published claim", "baseline here: eager", "ours here"]
    return Table([*columns, "ours over our dense", "ours over our SMI", "ours over dense eager"], lines, read, "Patch rebirth")


def goals(results: Results) -> Table:
    """What the steps and PRI are held to."""
    lines, read = [], []
    for goal in GOALS[results.on]:
        row = results.get("step", goal.case, "ours")
        over = row and row.get(f"over_{goal.other}")
        text = f"{over[1]:.2f}x ({over[0]:.2f}-{over[2]:.2f})" if over else MISSING
        lines.append([f"step: {goal.case}, over {goal.other}", f"{goal.least}x", text, _of_peak(row)])
        read += [row] if row else []
    ours, eager = results.rate(BASE, PRI7, "ours"), results.rate(BASE, DENSE, "eager")
    figure = f"images per second: {TITLES[BASE]} PRI v=7 over dense eager"
    of_peak = _of_peak(results.whole(BASE, PRI7.title, "ours"))
    lines.append([figure, f"{WHOLE_GOAL[results.on]}x", ratio(ours and ours.images, eager and eager.images), of_peak])
    read += _rows((ours, eager))
    return Table(["figure", "at least", "here (20-80 %)", "fraction of measured GEMM peak"], lines, read, "Held to")


def _of_peak(row: dict | None) -> str:
    return f"{row['share_of_products']:.0%} ({row['dtype']})" if row and row.get("share_of_products") else MISSING


def suite_rows(device: str, all_runs: bool) -> list[dict]:
    """What the suites measured on the processor that they last ran on: in the last run, or of every case in the last run that has it."""
    rows = [row for row in record.read(record.RESULTS / f"{device}.jsonl") if "suite" in row]
    rows = [row for row in rows if processor(row) == processor(rows[-1])]
    if not all_runs:
        return record.newest_run(rows)
    last = {id(row) for kind in ("memory", "step", "whole", "case") for measurement in current(rows, kind) for row in measurement.rows}
    return [row for row in rows if id(row) in last]


def as_markdown(results: Results, device: str, all_runs: bool, pictures: Iterable[str]) -> str:
    """Where it was measured, the tables, the pictures."""
    about = ", ".join(f"{key} {results.about[key]}" for key in ABOUT if key in results.about)
    command = f"python -m bench.paper --device {device}{' --all-runs' if all_runs else ''}"
    lines = ["# Published, baseline, ours", "", f"Made by `{command}`. Measured on {about}.", ""]
    for table in paper_tables(results):
        lines += [f"## {table.title}", "", *table_lines(table), ""]
    return "\n".join(lines + [f"![{picture}]({picture}.png)\n" for picture in pictures])


def made_again(path: Path) -> str:
    """A paper.md as the rows give it now, by the command that it names; raises InputError where they do not."""
    found = MADE_BY.search(path.read_text())
    rows = suite_rows(found["device"], bool(found["all"])) if found else []
    if not rows:
        reason = f"holds the tables of {found['device']}, of which there are no rows" if found else "does not name the command that made it"
        raise InputError(f"{path.name} {reason}: run python -m bench.paper")
    pictures = [name for name in PICTURES if path.with_name(f"{name}.png").exists()]
    return as_markdown(Results(rows), found["device"], bool(found["all"]), pictures)
