"""Checks of GPU versions: the error rule on the arguments that stand for a class of sizes, then the time beside stock PyTorch's.

They run in a process of their own: a kernel that breaks its device's context, ends its process or never ends takes nothing else with it.

A verdict that a version is not to be used comes from a process in which nothing ran before: where a check does not succeed, its process is ended and
the check made once more in a new one. As long as checks succeed they share a process, because a new one takes seconds.

The process reads one line of JSON for each check from its standard input, {"key": [...], "device": number or null}, and writes one verdict to its
standard output. Whatever else is printed in it goes to standard error.
"""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from . import comparison, timing, versions
from .verdicts import Key, Verdict, verdict_of

SECONDS = 180.0  # that one check may take, compilation included
IDLE = 10.0  # seconds after which a process that is asked nothing ends and gives its memory on the device back
CODE = "import sys; sys.path = list(filter(None, sys.path)); from smi.kernels.check_process import serve; serve()"  # nothing from the current folder


class Checker:
    """Makes checks in a process; a context that ends the process. seconds: that one check may take; code: what the process runs."""

    def __init__(self, seconds: float = SECONDS, code: str = CODE):
        self.seconds, self.code = seconds, code
        self.process: subprocess.Popen | None = None
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.fresh = True  # whether the process was asked nothing yet

    def __enter__(self) -> "Checker":
        return self

    def __exit__(self, *error: Any) -> None:
        self.end()

    def check(self, key: Key, device: torch.device) -> Verdict:
        """The verdict on a key; "crashed" with the reason where there is no answer."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        fresh, self.fresh = self.fresh, False
        found = self._ask(key, device)
        if not found.wrong:
            return found
        self.end()
        return found if fresh else self.check(key, device)

    def start(self) -> None:
        """Start a process that finds the same modules as this one."""
        root = str(Path(sys.modules["smi"].__path__[0]).parent)
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
        )
        self.answers, self.fresh = queue.Queue(), True
        threading.Thread(target=_forward, args=(self.process.stdout, self.answers), daemon=True).start()

    def end(self) -> None:
        """End the process, whatever it does."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            with suppress(OSError):  # what it did not read is lost
                process.stdin.close()  # type: ignore[union-attr]  # a pipe

    def _ask(self, key: Key, device: torch.device) -> Verdict:
        process = self.process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"key": key, "device": device.index if device.type == "cuda" else None}) + "\n")
            process.stdin.flush()
            answer = self.answers.get(timeout=self.seconds)
        except OSError:
            answer = None
        except queue.Empty:
            return verdict_of(key, "crashed", f"no answer within {self.seconds:g} s")
        if answer is None:
            return verdict_of(key, "crashed", f"its process {how_it_ended(process.wait(self.seconds))}")
        return Verdict(*json.loads(answer))


def _forward(lines: TextIO, answers: queue.Queue) -> None:
    with lines:
        for line in lines:
            answers.put(line)
    answers.put(None)


def how_it_ended(code: int) -> str:
    """A process's exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def serve() -> None:
    """What the process does: check after check, until it is asked nothing for a while or nobody can ask."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers and libraries print is no answer
    while select.select([0], [], [], IDLE)[0]:
        line = _read_line()
        if not line:
            return
        asked = json.loads(line)
        device = torch.device("cpu") if asked["device"] is None else torch.device("cuda", asked["device"])
        found = self_check(Key(*asked["key"]), device)
        if device.type == "cuda" and not found.wrong:  # after an error its process ends
            torch.cuda.empty_cache()
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _read_line() -> bytes:
    """One line of standard input, unbuffered, so that `select` sees what is left of it."""
    found = b""
    while not found.endswith(b"\n"):
        more = os.read(0, 1)
        if not more:
            return b""
        found += more
    return found


# ---- one check


def self_check(key: Key, device: torch.device) -> Verdict:
    """Compare with the definition on the device, then time against stock PyTorch. What fails makes the verdict."""
    dtype = getattr(torch, key.dtype)
    try:
        torch.manual_seed(0)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return _checked(key, dtype, device)
    except Exception as error:  # a compiler that fails is a verdict too: the operation has other versions
        return verdict_of(key, "crashed" if lies_in_the_machine(error, device) else "failed", f"{type(error).__name__}: {error}"[:300])


def lies_in_the_machine(error: Exception, device: torch.device) -> bool:
    """Whether an error says nothing about a version: memory ran out, or CUDA reports what may come from another kernel or process."""
    if isinstance(error, torch.OutOfMemoryError) or "CUDA" in f"{type(error).__name__} {error}":
        return True
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises what a kernel did that was launched before
    except Exception:
        return True
    return False


def _checked(key: Key, dtype: torch.dtype, device: torch.device) -> Verdict:
    sizes = versions.sizes_of(key.operation)
    written, comparable = getattr(sizes, "WRITTEN", {}).get(key.function, ()), getattr(sizes, "comparable", None)
    usual, errors = None, []
    for args in sizes.arguments(key.function, key.size, dtype, device):
        reason = versions.why_not(key.operation, key.version, key.function, args) or versions.ensure_built(key.operation, key.version)
        if reason and usual is None:  # the usual ones come first; of the others a class may have some that a version leaves to the next
            return verdict_of(key, "unsupported", reason)
        usual = args if usual is None else usual
        if not reason:
            errors += comparison.compare_function(*key[:3], args, dtype, written, comparable)
    worst = max(errors, key=lambda e: e.error / e.allowed if e.allowed else float(e.error > 0))
    note = f"largest error {worst.error:.1e} in {worst.name}, {worst.allowed:.1e} allowed"
    if not all(e.passes for e in errors):
        return verdict_of(key, "incorrect", note)
    assert usual is not None
    return verdict_of(key, "correct", note, speedup(key, usual, device))


def speedup(key: Key, args: tuple, device: torch.device) -> float:
    """Median time of stock PyTorch over that of the version, each in a CUDA graph."""

    def captured(version: str) -> Callable[[], object]:
        function = getattr(versions.load(key.operation, version), key.function)
        return timing.captured(lambda: function(*args), device)

    samples = timing.alternate({version: captured(version) for version in ("stock", key.version)}, device)
    return timing.quantiles(samples["stock"]).median / timing.quantiles(samples[key.version]).median
