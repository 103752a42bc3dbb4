"""Whether the versions of the operations are correct and faster than stock PyTorch on this GPU."""

from collections.abc import Collection

import torch

from smi.kernels import verification
from smi.kernels.check_process import Checker
from smi.kernels.verdicts import Verdict, identity

from ..cases.operations import Case
from .budget import Budget

RESERVE = 20.0  # seconds that one check, or one case, may take


def verdicts(device: torch.device, operations: Collection[str], budget: Budget) -> list[Verdict]:
    """Correctness and speed of every raw function of every version, dtype and class of sizes, the engine's usual ones first, each check in a process
    that no other can have broken."""
    found, left_out = [], []
    with Checker() as checker:
        for key in verification.keys(operations):
            if budget.left() < RESERVE:
                left_out.append(key)
            else:
                found.append(verification.checked(key, device, checker))
    if left_out:
        print(f"no time left to verify {len(left_out)} of {len(found) + len(left_out)}, from {left_out[0]} on")
    return found


def row(found: Verdict, device: torch.device) -> dict:
    """A verdict's row in a result file: with what it is about, from which `bench.tables.verified` makes the table that ships."""
    about = identity(found.operation, device)
    return {"kind": "verdict"} | {name: about[name] for name in ("triton", "ptxas", "source")} | found._asdict()


def chosen(case: Case, found: list[Verdict]) -> str:
    """What the verdicts make `auto` choose for a case, forward and backward."""
    taken = {}
    for function, size in case.sizes.items():
        about = (case.operation, function, verification.short(case.dtype), size)
        mine = [v for v in found if v.chosen and (v.operation, v.function, v.dtype, v.size) == about]
        taken[function] = max(mine, key=lambda v: v.speedup).version if mine else "stock"
    versions = set(taken.values())
    return versions.pop() if len(versions) == 1 else ", ".join(f"{function} in {version}" for function, version in taken.items())
