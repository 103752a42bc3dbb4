"""Rows of an experiment as the result files take them."""

from collections.abc import Iterable

import torch

from ..measuring.record import append, environment, results_file


def with_environment(kind: str, rows: Iterable[dict], device: str = "cpu") -> list[dict]:
    """The rows with their kind, and what every row says about where and when it was measured. What a row says itself stands."""
    about = environment(torch.device(device))
    return [{"kind": kind, **about, **row} for row in rows]


def append_to_results(rows: list[dict]) -> None:
    append(results_file(rows[0]["device"]), rows)
