"""Tables of finished images per second, and the few figures that say how fast it is, processor by processor."""

from collections.abc import Sequence

from smi.inversion.methods import COMPARED, DENSE, PRI7, SMI

from ..cases.suites import BASE, TINY
from .results import Results
from .rows import current
from .suites import by_size, is_key, named, short
from .table import Table, three_digits

SHOWN = {TINY: COMPARED, BASE: (SMI, PRI7)}
KINDS = ("step", "whole")


def by_processor(rows: Sequence[dict]) -> dict[str, Results]:
    """What the suites found on each processor, in the last run of every case."""
    found: dict[str, list[dict]] = {}
    for kind in ("memory", *KINDS):
        for measurement in current(rows, kind):
            found.setdefault(measurement.processor, []).extend(measurement.rows)
    return {name: Results(mine) for name, mine in found.items()}


def images_per_second(rows: Sequence[dict]) -> list[Table]:
    """Finished images per second, from whole runs or the steps of all stages."""
    return [table for results in by_processor(rows).values() if (table := _images_per_second(results)).lines]


def _images_per_second(results: Results) -> Table:
    lines, read = [], []
    for model, methods in SHOWN.items():
        dense = {side: results.rate(model, DENSE, side) for side in ("eager", "ours")}
        for method in methods:
            eager, ours = (results.rate(model, method, side) for side in ("eager", "ours"))
            if not (eager and ours):
                continue
            gains = [_factor(ours.images, other and other.images) for other in (dense["eager"], dense["ours"])]
            over_same = f"{ours.images / eager.images:.2f}x"
            lines.append([f"{short(model)} {method.title}", f"{eager.images:.4f}", f"{ours.images:.4f}", over_same, *gains])
            read += [row for rate in (eager, ours, *dense.values()) if rate for row in rate.rows]
    columns = ["images per second", "eager", "ours", "over the same by eager", "over dense eager", "over our dense"]
    return Table(columns, lines, read)


def _factor(mine: float, other: float | None) -> str:
    return f"{three_digits(mine / other)}x" if other else ""


def speed(rows: Sequence[dict]) -> list[Table]:
    """The step at all patches and at SMI's last stage, and images by PRI v=7 over dense eager: a column for each processor."""
    cells: dict[str, dict[str, str]] = {}  # of a line, by processor
    read: list[dict] = []
    chosen = [step for step in current(rows, "step") if is_key(step.about) and step.about["model"] in SHOWN]
    for step in sorted(chosen, key=by_size):
        ours, eager = step.side("ours"), step.side("eager")
        if ours and eager:
            text = f"{ours['over_eager'][1]:.2f}x ({eager['ms'][1]:.0f} to {ours['ms'][1]:.0f} ms)"
            cells.setdefault(f"step: {named(step.about)}", {})[step.processor] = text
            read += [ours, eager]
    for name, results in by_processor(rows).items():
        for model in (BASE, TINY):
            ours, eager = results.rate(model, PRI7, "ours"), results.rate(model, DENSE, "eager")
            if ours and eager:
                text = f"{three_digits(ours.images / eager.images)}x ({eager.images:#.2g} to {ours.images:#.2g})"
                what = f"images per second: {short(model)}, PRI of {PRI7.division} images a trajectory, over dense eager"
                cells.setdefault(what, {})[name] = text
                read += [*ours.rows, *eager.rows]
    processors = list(dict.fromkeys(name for line in cells.values() for name in line))
    lines = [[what, *(line.get(name, "not measured") for name in processors)] for what, line in cells.items()]
    return [Table(["over eager", *processors], lines, read)]
