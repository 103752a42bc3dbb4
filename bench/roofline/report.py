"""The modelled step as a table: kernels of one kind and one size in a line."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from ..measuring.record import ROOT
from .loops import record_step
from .model import H200, Estimate, estimate

DOCUMENT = ROOT / "docs" / "gpu-model.md"


class Case(NamedTuple):
    """A step whose time is modelled. most: milliseconds that it may take."""

    model: str
    title: str
    patches: int
    batch: int
    most: float


CASES = (
    Case("deit_base_patch16_224", "DeiT-Base", 196, 128, 19.3),
    Case("deit_base_patch16_224", "DeiT-Base", 46, 128, 5.4),
    Case("deit_tiny_patch16_224", "DeiT-Tiny", 46, 128, 1.0),
)
COLUMNS = (
    "kernel",
    "tile",
    "calls",
    "µs each",
    "ms",
    "bound by",
    "of 790 TFLOP/s",
    "of 4.3 TB/s",
    "registers",
    "shared, B",
    "programs",
)
SHOWN = 0.004  # of the step: kernels below it share a line


def estimates(case: Case) -> list[Estimate]:
    """Of every kernel of a step, in order."""
    return [estimate(kernel) for kernel in record_step(case.model, case.patches, case.batch)]


def milliseconds(found: Sequence[Estimate]) -> float:
    return 1e3 * sum(each.seconds for each in found)


def title_of(case: Case, found: Sequence[Estimate]) -> str:
    """The case and its sums."""
    flops, moved = sum(each.flops for each in found), sum(each.bytes for each in found)
    work = f"{len(found)} kernels, {flops / 1e12:.2f} TFLOP, {moved / 1e9:.1f} GB"
    return f"{case.title}, batch {case.batch}, {case.patches + 1} tokens: {milliseconds(found):.2f} ms modelled ({work})"


def lines_of(found: Sequence[Estimate]) -> list[list[str]]:
    """Cells under COLUMNS, the longest first; the last line is that of all short kernels."""
    kinds = defaultdict(list)
    for each in found:
        kinds[each.name, each.tile, each.flops, each.bytes].append(each)
    whole = sum(each.seconds for each in found)
    ranked = sorted(kinds.values(), key=lambda kind: -sum(each.seconds for each in kind))
    shown = [kind for kind in ranked if sum(each.seconds for each in kind) >= SHOWN * whole]
    rest = [each for kind in ranked[len(shown) :] for each in kind]
    lines = [_line(kind) for kind in shown]
    return [*lines, ["the others", "", str(len(rest)), "", f"{milliseconds(rest):.2f}", *[""] * 6]] if rest else lines


def _line(kind: list[Estimate]) -> list[str]:
    one = kind[0]
    code = [str(one.code.registers), str(one.code.shared), str(one.resident)] if one.code else ["", "", ""]
    speed = f"{one.flops / one.seconds / H200.flops:.0%}".replace("%", " %") if one.flops else ""
    traffic = f"{one.bytes / one.seconds / H200.bandwidth:.0%}".replace("%", " %")
    return [one.name, one.tile, str(len(kind)), f"{1e6 * one.seconds:.1f}", f"{milliseconds(kind):.2f}", one.bound, speed, traffic, *code]


def as_markdown(title: str, lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS), *("| " + " | ".join(line) + " |" for line in lines)]
    return f"{title}.\n\n" + "\n".join(rows) + "\n"


BEGIN, END = "<!-- modelled steps (python -m bench.roofline --write) -->\n", "<!-- end of modelled steps -->"


def written(document: str, parts: Sequence[str]) -> str:
    """A document with these parts between its markers; raises ValueError where it has none."""
    if not re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", document, re.DOTALL):
        raise ValueError(f"the document has no place for the tables: put {BEGIN.strip()} and {END} around it")
    before, _, rest = document.partition(BEGIN)
    return before + BEGIN + "\n".join(parts) + END + rest.partition(END)[2]
