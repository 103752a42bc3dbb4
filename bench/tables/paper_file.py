"""bench/results/paper.md: the published tables of one device as a document that names the command it is made by."""

import re
from collections.abc import Iterable
from pathlib import Path

from smi.errors import InputError

from ..measuring import record
from .markdown import table_lines
from .paper import paper_tables
from .results import Results
from .rows import current, processor

ABOUT = ("device", "device_class", "threads", "torch", "triton", "timm", "python", "time", "commit", "dirty")
MADE_BY = re.compile(r"`python -m bench\.paper --device (?P<device>[\w-]+)(?P<all> --all-runs)?`")
PICTURES = ("speedup", "tokens")


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
