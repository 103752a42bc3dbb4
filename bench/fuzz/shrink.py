"""A smaller case with the same finding: fewer choices and lower ones, each tried in a fork of its own."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .draw import Given
from .forks import run_one
from .target import Target

SECONDS = 30.0


def shrink(target: Target, finding: dict[str, Any], folder: Path, seconds: float = SECONDS) -> dict[str, Any]:
    """The finding with the smallest case that was found in the time; the finding itself where it does not happen again."""
    best, tried, end = finding, {json.dumps(finding["case"])}, time.monotonic() + seconds

    def smaller(choices: Sequence[int]) -> bool:
        nonlocal best
        draw = Given(choices)
        case = json.dumps(target.make(draw))
        if case in tried or time.monotonic() > end or _size(draw.taken) >= _size(best["choices"]):
            return False
        tried.add(case)
        found = run_one(target, lambda: Given(choices), folder / str(len(tried))).findings
        if not found or found[0]["key"] != finding["key"]:
            return False
        best = found[0]
        return True

    while time.monotonic() < end and any(smaller(candidate) for candidate in _candidates(best["choices"])):
        pass
    return best


def _size(choices: Sequence[int]) -> tuple[int, int]:
    return len(choices), sum(choices)


def _candidates(choices: list[int]) -> list[list[int]]:
    """Smaller lists, the smallest first: an end cut off, a run left out, a choice lowered."""
    count, made = len(choices), [choices[: len(choices) // 2]]
    for length in (8, 4, 2, 1):
        made += [choices[:at] + choices[at + length :] for at in range(count - length, -1, -1)]
    for at in range(count):
        lower = {0, *(choices[at] - 2**bit for bit in range(choices[at].bit_length()))} - {choices[at]}
        made += [[*choices[:at], value, *choices[at + 1 :]] for value in sorted(lower)]
    return made
