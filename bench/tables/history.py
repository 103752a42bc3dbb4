"""What was measured before, so that no row is read by nobody."""

from collections.abc import Sequence

from .evidence import EVIDENCE
from .experiments import AGREEMENT, CLAIMS, CPU_ATTENTION, DEMO, FUZZ, INT8, METHOD
from .ranges import RANGES
from .rows import Measurement, commit, measurements, superseded
from .suites import CASE, MEMORY, STEP, VERDICT, WHOLE, by_size, is_key
from .table import Layout, Table

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
    "claims": CLAIMS,
    "fuzz": FUZZ,
    "method": METHOD,
    "ranges": RANGES,
}
RETIRED = ("method",)  # kinds that are no longer measured and have no table of their own: the suite of whole runs measures the same


def history(rows: Sequence[dict]) -> list[Table]:
    """How the key steps became faster: every measurement of each, oldest first."""
    chosen = sorted((step for step in measurements(rows) if step.kind == "step" and is_key(step.about) and step.side("ours")), key=by_size)
    return [_with_dates(STEP, [step for step in chosen if step.processor == name]) for name in dict.fromkeys(step.processor for step in chosen)]


def older(rows: Sequence[dict]) -> list[Table]:
    """Every measurement that a later one supersedes, and what is no longer measured; a table for each kind."""
    old = [found for found in superseded(rows) if found.kind not in RETIRED]
    old += [found for found in measurements(rows) if found.kind in RETIRED]
    by_kind = {kind: [found for found in old if found.kind == kind] for kind in LAYOUTS}
    return [_with_dates(LAYOUTS[kind], mine, LAYOUTS[kind].title) for kind, mine in by_kind.items() if mine]


def _with_dates(layout: Layout, found: Sequence[Measurement], title: str = "") -> Table:
    lines = [[measurement.day, commit(measurement.about), *line] for measurement in found for line in layout.lines(measurement)]
    return Table(["date", "commit", *layout.columns], lines, layout.table(found).rows, title)
