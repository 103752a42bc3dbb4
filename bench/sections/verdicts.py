"""Verdicts: whether every raw function of every version is correct and faster than stock PyTorch, what the engine calls first."""

import torch

from smi.kernels import verification, versions
from smi.kernels.check_process import Checker
from smi.kernels.verdicts import COMPILED_BY, Key, Verdict, from_row, identity

from .setting import settle
from .worker import Work

REHEARSED = 6  # checks


def row(found: Verdict, device: torch.device) -> dict:
    """A verdict with what it is about, from which `bench.tables.verified` makes the table that ships."""
    about = identity(found.operation, device)
    return {"kind": "verdict"} | {name: about[name] for name in COMPILED_BY} | found._asdict()


def run(work: Work) -> None:
    """Each check in a process that no other can have broken. Verdicts are kept in the user's cache: the sections that follow choose by them."""
    setting = settle(work)
    operations = work.options.get("operations") or (("layer_norm",) if setting.rehearsal else versions.OPERATIONS)
    keys = verification.keys(operations)[: REHEARSED if setting.rehearsal else None]
    with Checker() as checker:

        def check(key: Key) -> list[dict]:
            return [row(verification.checked(key, setting.device, checker), setting.device)]

        work.cases({str(key): lambda key=key: check(key) for key in keys}, setting.file, setting.about)
    work.found += [f"{sum(each['speedup'] > 1 for each in work.rows)} of {len(work.rows)} chosen"]
    work.wrong += [f"{verdict.key} {verdict.outcome}" for verdict in map(from_row, work.rows) if verdict.wrong]
