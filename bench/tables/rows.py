"""Rows of the result files: all of them, where they were measured, which belong to one measurement, and which a later one supersedes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from smi.kernels.verdicts import Key

from ..measuring import record

# What a row of each kind is about: a later measurement of the same subject supersedes an earlier one.
SUBJECTS: dict[str, Callable[[dict], tuple]] = {
    "step": lambda row: (row["suite"], row["case"]),
    "whole": lambda row: (row["case"],),
    "memory": lambda row: (row["case"],),
    "case": lambda row: (row["operation"], row["case"], row["dtype"]),
    "verdict": lambda row: tuple(row[name] for name in Key._fields),
    "evidence": lambda row: tuple(
        row["config"][name] for name in ("data", "tv_weight", *(["iterations"] if row["config"]["data"] == "imagenet" else []))
    ),
    "int8": lambda row: (row["model"], row["batch"]),
    "agreement": lambda row: (row["method"],),
    "cpu_attention": lambda row: tuple(row[key] for key in ("tokens", "width", "heads", "batch", "dtype", "threads")),
    "demo": lambda row: (row["model"],),
    "claims": lambda row: (row["model"],),
    "method": lambda row: (row["model"],),
    "fuzz": lambda row: (row["what"],),
    "ranges": lambda row: (row["model"], row["widths"]),
}
OF_A_PROCESSOR = (
    "step",
    "whole",
    "memory",
    "case",
    "verdict",
    "int8",
    "cpu_attention",
    "demo",
    "claims",
)  # whose figures no other processor's supersede
OF_ANY_THREADS = ("int8", "cpu_attention", "evidence", "ranges")  # which set the threads themselves


@dataclass(frozen=True)
class Measurement:
    """Rows of one kind and subject that were measured together: the sides of a step, the methods of the evidence."""

    kind: str
    processor: str
    subject: tuple
    rows: list[dict]

    @property
    def about(self) -> dict:
        return self.rows[0]

    @property
    def day(self) -> str:
        return _when(self.about)[:10]

    @property
    def key(self) -> tuple:
        """What a later measurement must share to supersede this one."""
        return self.kind, self.subject, self.processor if self.kind in OF_A_PROCESSOR else ""

    def side(self, name: str) -> dict:
        """The row of a side; an empty one where it was not measured."""
        found = [row for row in self.rows if row.get("side") == name and "not_timed" not in row and "not_measured" not in row]
        return found[-1] if found else {}


def read_all(folder: Path | None = None) -> list[dict]:
    """The rows of all devices, oldest first within a device."""
    return [row for path in sorted((folder or record.RESULTS).glob("*.jsonl")) for row in record.read(path)]


def processor(row: dict) -> str:
    """Where a row was measured: "AMD EPYC, AVX2, 2 threads", "NVIDIA H200, sm_90"."""
    device = row["device"]
    if isinstance(device, dict):  # rows of 2026-11-21 and 22 that are not of the suites
        return f"{device['name']}, {device['capability']}, {_threads(device['threads'])}"
    if "architecture" in row:
        return f"{device}, {row['architecture']}"
    _, vectors, *others, threads = row["device_class"].upper().split("-")
    name = f"{device}, {vectors}" + (f" with {' and '.join(others)}" if others else "")
    return name if row["kind"] in OF_ANY_THREADS else f"{name}, {_threads(int(threads.removesuffix('THREADS')))}"


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def measurements(rows: Iterable[dict]) -> list[Measurement]:
    """All measurements, oldest first: a result file holds the rows of one side by side."""

    def together(row: dict) -> tuple:
        return row["kind"], processor(row), SUBJECTS[row["kind"]](row), _when(row) or row["commit"]

    known = [row for row in rows if row.get("kind") in SUBJECTS]
    found = [Measurement(*key[:3], list(same)) for key, same in groupby(known, together)]
    return sorted(found, key=lambda measurement: _when(measurement.about))


def _when(row: dict) -> str:
    return row.get("run") or row.get("time") or ""


def current(rows: Iterable[dict], kind: str) -> list[Measurement]:
    """The measurements of a kind that no later one supersedes, subjects in the order in which they were first measured."""
    return list({measurement.key: measurement for measurement in measurements(rows) if measurement.kind == kind}.values())


def superseded(rows: Iterable[dict]) -> list[Measurement]:
    """The measurements that a later one supersedes."""
    every = measurements(rows)
    last = {measurement.key: measurement for measurement in every}
    return [measurement for measurement in every if last[measurement.key] is not measurement]


def measured_on(rows: Sequence[dict]) -> str:
    """Processor, torch, days and commits of some rows, in words."""

    def every(values: Iterable[str]) -> list[str]:
        return sorted({value for value in values if value})

    days = every(_when(row)[:10] for row in rows)
    versions = every(row["versions"]["torch"] if "versions" in row else row["torch"] for row in rows)
    commits = every(commit(row) for row in rows)
    parts = [" and ".join(every(map(processor, rows))), f"torch {' and '.join(versions)}", " to ".join(days[:: max(1, len(days) - 1)])]
    return ", ".join(filter(None, [*parts, f"{'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}"]))


def commit(row: dict) -> str:
    """The first characters of the commit, with a plus where its code had been changed."""
    return row["commit"][:7] + ("+" if row["dirty"] else "")
