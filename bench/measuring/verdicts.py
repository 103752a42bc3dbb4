"""Whether the versions of the operations are correct and faster than stock PyTorch on this GPU."""

from collections.abc import Iterable
from importlib import import_module

import torch

from smi.kernels import versions
from smi.kernels.verification import DTYPES, Verdict, self_check, short

from ..cases.operations import Case
from .budget import Budget

RESERVE = 20.0  # seconds that one self-check, or one case, may take


def verdicts(device: torch.device, operations: Iterable[str], budget: Budget) -> list[Verdict]:
    """Correctness and speed of every version on its typical arguments, in every dtype."""
    found = []
    for operation in operations:
        sizes = getattr(import_module(f"smi.kernels.{operation}.op"), "SIZES", ("any",))
        for version in (v for v in versions.NEEDS_VERDICT if versions.exists(operation, v)):
            for dtype in map(short, DTYPES):
                for size in sizes:
                    if budget.left() < RESERVE:
                        print(f"no time left to verify {operation} {version} {dtype} {size}")
                        continue
                    found.append(self_check(operation, version, device, dtype, size))
    return found


def chosen(case: Case, found: list[Verdict]) -> str:
    """What the verdicts make `auto` choose for a case."""
    key = (case.operation, short(case.dtype), case.size)
    mine = [v for v in found if (v.operation, v.dtype, v.size) == key and v.chosen]
    return max(mine, key=lambda v: v.speedup).version if mine else "stock"
