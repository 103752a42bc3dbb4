"""What the demo's images are worth on the digits' real test split: quantised accuracy, and accuracy of a student that learned from them.

The methods are independent, so two processes share them. Each is a Python interpreter of its own that writes its figures into the folders of images:
unlike a fork it is safe after torch has made threads, and unlike a spawn it does not run the caller's script again.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..console import make_console
from ..datasets import load
from ..distillation import distill, partly_fresh
from ..errors import InputError, RunError
from ..files import write_text
from ..images.sparse_images import SparseImages
from ..quantization import quantize
from ..quantization.model import accuracy
from ..quantization.recipe import CALIBRATION_IMAGES
from ..teachers import digits

WORTH = "worth.json"
WIDTHS = {"w8a8": (8, 8), "w4a8": (4, 8)}  # bits of weights and activations
FRESH_BLOCKS = 2  # of the teacher's four, with norm and head
TRANSFER_STEPS = 400
STUDENT_BATCH = 16  # images per step: what five minutes allow
PROCESSES = 2
PER_IMAGE = 24  # cost of an image beside its patches, in patches; to share the work evenly
POLL = 0.2  # seconds


@dataclass(frozen=True)
class Plan:
    """What one process does."""

    folders: list[str]  # of images
    transfer_steps: int  # 0: no transfer
    seed: int
    threads: int
    parent: int  # process id; without it nobody waits for the figures


def settings(transfer_steps: int) -> dict[str, Any]:
    """How the figures are measured, for the record."""
    made = {"quantisation": {"calibration_images": CALIBRATION_IMAGES, "ranges": "minmax", "kind": "simulated"}}
    if transfer_steps:
        student = f"the teacher with its last {FRESH_BLOCKS} blocks, norm and head re-initialised"
        made["transfer"] = {"student": student, "preset": "adamw", "steps": transfer_steps, "batch_size": STUDENT_BATCH}
    return {**made, "measured_on": "the real test images of digits"}


def judge_all(folders: Sequence[Path], *, transfer_steps: int, seed: int, progress: bool) -> dict[str, dict]:
    """The figures of every folder by its name: w8a8, w4a8, transfer (accuracies on the real test images), and notes. Raises RunError where a process
    fails."""
    processes = min(PROCESSES, torch.get_num_threads(), len(folders))
    threads = max(1, torch.get_num_threads() // processes)
    for folder in folders:
        (folder / WORTH).unlink(missing_ok=True)
    plans = [Plan([str(folder) for folder in share], transfer_steps, seed, threads, os.getpid()) for share in _shares(folders, processes)]
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-c", f"from {__name__} import main; main()"]
        workers = [subprocess.Popen([*command, json.dumps(asdict(plan))], stdin=subprocess.DEVNULL, stderr=errors) for plan in plans]
        try:
            _wait(workers, folders, progress)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if any(worker.returncode for worker in workers):
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise RunError(f"judging the images failed ({lines[-1] if lines else 'a process was killed'})")
    return {folder.name: json.loads((folder / WORTH).read_text()) for folder in folders}


def _wait(workers: Sequence[subprocess.Popen], folders: Sequence[Path], progress: bool) -> None:
    """Until every process has ended, or one has failed; shows how far they are on stderr."""
    console, told = make_console(stderr=True, quiet=not progress), -1
    with console.status("") as status:  # a line that moves on a terminal, nothing elsewhere
        while any(worker.poll() is None for worker in workers) and not any(worker.poll() for worker in workers):
            done = sum((folder / WORTH).exists() for folder in folders)
            if done != told:
                told, line = done, f"quantised and transferred: {done} of {len(folders)} methods"
                status.update(line) if console.is_terminal else console.print(line, highlight=False)
            time.sleep(POLL)


def _shares(folders: Sequence[Path], count: int) -> list[list[Path]]:
    """The folders dealt out to `count` processes, the most expensive first, each to the process with the least work."""
    costs = {folder: _cost(SparseImages.load(folder)) for folder in folders}
    shares: list[list[Path]] = [[] for _ in range(count)]
    for folder in sorted(folders, key=lambda folder: -costs[folder]):
        min(shares, key=lambda share: sum(costs[one] for one in share)).append(folder)
    return shares


def _cost(images: SparseImages) -> int:
    return images.index.shape[1] + PER_IMAGE


def worth(teacher: nn.Module, images: SparseImages, real: tuple[Tensor, Tensor], transfer_steps: int, seed: int) -> dict[str, Any]:
    """The figures of one method's images."""
    found: dict = {"notes": []}
    some = images[torch.linspace(0, len(images) - 1, min(CALIBRATION_IMAGES, len(images))).long()]  # over all trajectories and stages
    try:
        for name, (weights, activations) in WIDTHS.items():
            found[name] = accuracy(quantize(teacher, some, weight_bits=weights, activation_bits=activations), *real)
    except InputError as error:
        found["notes"].append(f"The quantised accuracy is left out: {error}.")
    if transfer_steps:
        student, every = partly_fresh(teacher, FRESH_BLOCKS, seed), max(1, transfer_steps // 2)
        options: dict[str, Any] = {"preset": "adamw", "steps": transfer_steps, "batch_size": STUDENT_BATCH, "eval_every": every, "seed": seed}
        found["transfer"] = distill(teacher, student, images, evaluation=real, progress=False, **options).accuracy
    return found


def main() -> None:
    """Work through the plan on the command line; Ctrl-C is the parent's to answer."""
    plan = Plan(**json.loads(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    torch.set_num_threads(plan.threads)
    teacher = digits()
    real = load("digits", teacher, "test")
    for folder in map(Path, plan.folders):
        if os.getppid() != plan.parent:
            return
        write_text(folder / WORTH, json.dumps(worth(teacher, SparseImages.load(folder), real, plan.transfer_steps, plan.seed)))
