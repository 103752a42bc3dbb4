"""Verdicts: whether every raw function is correct in every version and faster than stock PyTorch; what the engine calls in the usual runs first."""

from smi.kernels import verification, versions
from smi.kernels.check_process import Checker

from ..measuring.verdicts import row
from .setting import settle
from .worker import Work


def run(work: Work) -> None:
    """The verdicts are kept in the user's cache, too, so that the sections that follow choose by them."""
    setting = settle(work)
    operations = work.options.get("operations") or (("layer_norm",) if setting.rehearsal else versions.OPERATIONS)
    with Checker() as checker:
        named = {
            str(key): lambda key=key: [row(verification.checked(key, setting.device, checker), setting.device)]
            for key in verification.keys(operations)
        }
        work.cases(named, setting.file, setting.about)
    chosen = [each for each in work.rows if each["outcome"] == "correct" and each["speedup"] > 1]
    work.found += [f"{len(chosen)} of {len(work.rows)} chosen"]
    work.wrong += [f"{each['operation']} {each['function']} {each['version']} {each['dtype']}" for each in work.rows if is_wrong(each)]


def is_wrong(row: dict) -> bool:
    return row["outcome"] not in ("correct", "unsupported")
