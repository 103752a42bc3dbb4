"""The tables by their names, the documents that show them, and the rows that none reads."""

from collections.abc import Sequence
from pathlib import Path

from ..measuring import record
from . import evidence, experiments, paper, ranges, speed, suites
from .history import history, older
from .markdown import Maker, Rendered, render
from .table import Table

PATTERNS = ("*.md", "docs/**/*.md", "bench/**/*.md", "kernels/**/*.md", "csrc/**/*.md")
PAPER = "paper"  # the name of bench/results/paper.md as a whole


def published(make) -> Maker:
    """One of the published tables for every processor that the suites ran on."""

    def tables(rows: Sequence[dict]) -> list[Table]:
        return [make(results) for results in speed.by_processor(rows).values()]

    tables.__doc__ = make.__doc__
    return tables


TABLES: dict[str, Maker] = {
    "speed": speed.speed,
    "steps": suites.steps,
    "stages": suites.stages,
    "scaling": suites.scaling,
    "images-per-second": speed.images_per_second,
    "whole-runs": suites.whole_runs,
    "memory": suites.memory,
    "operations": suites.operations,
    "verdicts": suites.verdicts,
    "evidence-digits": evidence.digits,
    "evidence-cifar10": evidence.cifar10,
    "evidence-imagenet": evidence.imagenet,
    "evidence-imagenet-paired": evidence.imagenet_paired,
    "evidence-imagenet-published": evidence.imagenet_published,
    "evidence": evidence.every,
    **ranges.MAKERS,
    "demo": experiments.demo,
    "claims": experiments.claims,
    "int8": experiments.int8,
    "agreement": experiments.agreement,
    "cpu-attention": experiments.cpu_attention,
    "fuzz": experiments.fuzz,
    "history": history,
    "older": older,
    "throughput": published(paper.throughput),
    "flops": published(paper.flops),
    "paper-memory": published(paper.memory),
    "rebirth": published(paper.rebirth),
    "goals": published(paper.goals),
}


def documents(root: Path) -> list[Path]:
    return sorted({path for pattern in PATTERNS for path in root.glob(pattern)})


def rendered(path: Path, rows: Sequence[dict]) -> Rendered:
    """A document as the rows give it."""
    held = path.read_text()
    if path != record.RESULTS / "paper.md":
        return render(held, TABLES, rows)
    made = paper.made_again(path)
    return Rendered(made, [PAPER] if made != held else [], [])


def unread(rows: Sequence[dict]) -> list[dict]:
    """Rows that no table reads."""
    read = {id(row) for make in TABLES.values() for table in make(rows) for row in table.rows}
    return [row for row in rows if id(row) not in read]
