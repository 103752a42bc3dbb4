"""Verdicts as rows of the result files, and what they make `auto` choose."""

import torch

from smi.kernels import verification
from smi.kernels.verdicts import Verdict, identity

from ..cases.operations import Case


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
