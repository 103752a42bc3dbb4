"""What was measured before: every measurement that a later one supersedes, so that no row is read by nobody."""

from collections.abc import Sequence

from .evidence import EVIDENCE
from .experiments import AGREEMENT, CPU_ATTENTION, DEMO, INT8, METHOD
from .rows import commit, measurements, superseded
from .suites import CASE, MEMORY, STEP, VERDICT, WHOLE
from .table import Table

LAYOUTS = {
    "step": STEP,
    "whole": WHOLE,
    "memory": MEMORY,
    "case": CASE,
    "verdict": VERDICT,
    "evidence": EVIDENCE,
    "int8": INT8,
    "agreement": AGREEMENT,
    "cpu_attention": CPU_ATTENTION,
    "demo": DEMO,
    "method": METHOD,
}
RETIRED = ("method",)  # kinds that are no longer measured and have no table of their own: the suite of whole runs measures the same


def history(rows: Sequence[dict]) -> list[Table]:
    """Superseded measurements, oldest first, a table for each kind."""
    old = [found for found in superseded(rows) if found.kind not in RETIRED]
    old += [found for found in measurements(rows) if found.kind in RETIRED]
    tables = []
    for kind, layout in LAYOUTS.items():
        mine = [measurement for measurement in old if measurement.kind == kind]
        tables += [_with_dates(layout, mine)] if mine else []
    return tables


def _with_dates(layout, mine) -> Table:
    lines = []
    for measurement in mine:
        when = measurement.about.get("run") or measurement.about.get("time") or ""
        lines += [[when[:10], commit(measurement.about), *line] for line in layout.lines(measurement)]
    return Table(["date", "commit", *layout.columns], lines, layout.table(mine).rows, layout.title)
