"""Bytes of a step's saved activations, and the peak memory of a process that takes steps.

On the CPU, where the peak is that of a process, one process measures one side and prints its peak above idle as JSON:

    python -m bench.measuring.memory --side eager --model deit_tiny_patch16_224 --batch 2

`python -m bench.run --suite memory` starts one for every side. On a GPU, whose allocator counts, all sides are measured in the process that asks.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..cases.suites import MemoryCase
from ..sides import compiled
from ..sides.make import build_model, make_step
from .record import ROOT

STEPS = 2  # of the measured process


def measure_memory(case: MemoryCase, device: torch.device) -> list[dict]:
    """Rows of all sides: bytes of saved activations, and the peak above the level with the model loaded, on the CPU in a process of its own."""
    rows = []
    peak = peak_here if device.type == "cuda" else peak_of
    model = build_model(case.model, {}, device)
    for side in case.sides:
        about = {"kind": "memory", "case": case.name, "model": case.model, "batch": case.batch, "active": case.active, "side": side}
        try:
            kept = make_step(side, model, case.batch, case.active, variant=compiled.PLAIN).kept_bytes()
            rows.append(about | {"kept_bytes": kept} | peak(side, case.model, case.batch, case.active, {}, device, torch.get_num_threads()))
        except Exception as error:  # out of memory, for example: the other sides are still measured
            rows.append(about | {"not_measured": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
    return rows


def peak_of(side: str, model: str, batch: int, active: int | None, options: dict, device: torch.device, threads: int | None = None) -> dict:
    """What `measure_process` finds in a process of its own. Raises RuntimeError where that process fails."""
    command = [sys.executable, "-m", "bench.measuring.memory", "--side", side, "--model", model, "--batch", str(batch), "--device", str(device)]
    command += ["--options", json.dumps(options)] + (["--active", str(active)] if active else []) + (["--threads", str(threads)] if threads else [])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process of {side} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_here(side: str, model: str, batch: int, active: int | None, options: dict, device: torch.device, threads: int | None = None) -> dict:
    """The same on a GPU in this process, which is left as it was."""
    found = measure_process(side, model, batch, active, options, device)
    gc.collect()
    torch.cuda.empty_cache()
    return found


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call needs beyond what is allocated before; 0 on the CPU."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class ProcessMemory:
    """Resident memory of this process: its level when made, and the highest since."""

    def __init__(self):
        self.since = "made"
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the highest level so far
        except OSError:
            self.since = "start of the process"
        self.idle = self._status("VmRSS")

    def peak(self) -> int:
        return self._status("VmHWM")

    def _status(self, field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


def measure_process(side: str, model: str, batch: int, active: int | None, options: dict, device: torch.device) -> dict:
    """{"idle_bytes", "peak_above_idle_bytes", "since", "resolved"}: memory of this process with the model loaded; its peak above that in STEPS
    steps.

    On CUDA it is what torch has allocated on the device, else resident memory, whose peak counts from what `since` names.
    """
    network = build_model(model, options, device)
    if device.type == "cuda":
        gc.collect()  # what other sides left
        torch.cuda.reset_peak_memory_stats(device)
        idle = torch.cuda.memory_allocated(device)
    else:
        level = ProcessMemory()
        idle = level.idle
    step = make_step(side, network, batch, active, copy_model=False)
    for _ in range(STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak, since = torch.cuda.max_memory_allocated(device), "made"
    else:
        peak, since = level.peak(), level.since
    return {"idle_bytes": idle, "peak_above_idle_bytes": peak - idle, "since": since, "resolved": step.resolved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", required=True, choices=("ours", "recompute", "eager", "compiled"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--active", type=int, help="patches; all without it")
    parser.add_argument("--options", type=json.loads, default={}, help="of the model's constructor, as JSON")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    print(json.dumps(measure_process(given.side, given.model, given.batch, given.active, given.options, given.device)))


if __name__ == "__main__":
    main()
