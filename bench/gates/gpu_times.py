"""Times of our steps on a GPU, held against the committed rows of the same device."""

import torch

from smi.console import print_table
from smi.kernels.timing import Quantiles

from ..cases import suites
from ..measuring import record
from ..measuring.ceilings import ceilings_by_dtype
from ..measuring.inversions import measure_step
from .ratios import slower

CASES = 4  # the first ones of the suite
SECONDS = 20.0  # each


def check_gpu_times() -> int:
    """Hold the times of our steps against the newest committed rows of this GPU; how many are slower."""
    device = torch.device("cuda", torch.cuda.current_device())
    rows = record.read(record.results_file(torch.cuda.get_device_name(device)))
    ceilings = ceilings_by_dtype(device)
    lines, failed = [], 0
    for case in suites.on_gpu().steps[:CASES]:
        key = {"kind": "step", "case": case.name, "side": "ours", "dirty": False}
        committed = [row for row in rows if "ms" in row and all(row.get(name) == value for name, value in key.items())]
        (now,) = [row for row in measure_step(case, device, SECONDS, ceilings) if row["side"] == "ours" and "ms" in row]
        worse = bool(committed) and slower(Quantiles(*now["ms"]), Quantiles(*committed[-1]["ms"]))
        failed += worse
        before = f"{committed[-1]['ms'][1]:.2f}" if committed else "-"
        lines.append([case.name, before, f"{now['ms'][1]:.2f}", "REGRESSED" if worse else "ok" if committed else "new"])
    print_table("our steps on this GPU, ms", ["step", "committed", "now", ""], lines)
    return failed
