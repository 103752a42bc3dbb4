"""Cases in forks of this process, which has everything loaded: a crash or a hang ends the fork, and its log names the case.

A fork writes each case to its log before it runs it and the outcome behind it. It has limits of memory and of file size; a case that takes too long
is ended by SIGPROF, or by SIGALRM where it sleeps, whose default action no code of the case can hold up.
"""

import faulthandler
import gc
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .draw import Draw
from .target import ROOT, Target, describe_finding

MEMORY = 3 * 2**30  # bytes of address space beyond what this process has
BLOW_UP = 512 * 2**20  # bytes of resident memory that no case may add
LARGEST_FILE = 256 * 2**20  # bytes
CASES, SECONDS = 500, 3.0  # of a fork, whichever comes first
HANGS = {signal.SIGPROF: (signal.ITIMER_PROF, 1), signal.SIGALRM: (signal.ITIMER_REAL, 5)}  # times the seconds: of the processor; asleep, or waiting
MOST_OUTPUT = 4000  # characters of a fork that did not come to its end


@dataclass
class Ran:
    """What a fork did."""

    cases: int = 0
    outcomes: Counter = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)


def start(target: Target, draws: Iterable[Callable[[], Draw]], folder: Path, seconds: float = SECONDS) -> int:
    """Run cases of a target in a fork, and return its process id. folder: for its log and its files; made here."""
    folder.mkdir(parents=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        _limit(folder)
        _run(target, draws, folder, seconds)
        os._exit(0)
    finally:
        os._exit(1)


def _limit(folder: Path) -> None:
    gc.freeze()  # the collector would copy the pages that are shared
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable(file=output)
    for number in HANGS:
        signal.signal(number, signal.SIG_DFL)
        faulthandler.register(number, file=output, chain=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the campaign, not its cases
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = {resource.RLIMIT_AS: pages * resource.getpagesize() + MEMORY, resource.RLIMIT_FSIZE: LARGEST_FILE, resource.RLIMIT_CORE: 0}
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _run(target: Target, draws: Iterable[Callable[[], Draw]], folder: Path, seconds: float) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    own, end = folder / "case", time.monotonic() + seconds
    (folder / "here").mkdir()
    os.chdir(folder / "here")
    for make_draw in draws:
        draw = make_draw()
        case = target.make(draw)
        os.write(log, (json.dumps({"case": case, "choices": draw.taken}) + "\n").encode())
        own.mkdir(exist_ok=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for timer, times in HANGS.values():
            signal.setitimer(timer, times * target.seconds)
        try:
            outcome: dict[str, Any] | str = target.check(case, own)
        except BaseException as error:  # whatever it is: that is what is looked for
            outcome = describe_finding(error)
        for timer, _ in HANGS.values():
            signal.setitimer(timer, 0)
        added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if added > BLOW_UP:
            outcome = {"key": f"memory {target.name}", "message": f"the case took {added / 2**20:.0f} MiB", "traceback": ""}
        os.write(log, (json.dumps({"outcome": outcome}) + "\n").encode())
        if isinstance(outcome, dict):
            shutil.rmtree(own, ignore_errors=True)
        if time.monotonic() > end:
            return


def result(target: Target, folder: Path, status: int) -> Ran:
    """What a fork did that ended with this status of `os.waitpid`; its folder is removed."""
    ran, case = Ran(), None
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    for line in lines:
        entry = json.loads(line)
        if "case" in entry:
            case, ran.cases = entry, ran.cases + 1
            continue
        outcome = entry["outcome"]
        ran.outcomes[outcome if isinstance(outcome, str) else "finding"] += 1
        if isinstance(outcome, dict):
            ran.findings.append(outcome | (case or {}))
        case = None
    if status:
        output = (folder / "output").read_text(errors="replace") if (folder / "output").exists() else ""
        output = "\n".join(line for line in output.splitlines() if not line.startswith("Extension modules"))
        crashed = output.rfind("Fatal Python error")  # the stack below it may be deep: its top says where
        output = output[-MOST_OUTPUT:] if crashed < 0 else output[crashed:][:MOST_OUTPUT]
        ran.findings.append(_ended(target, status, output) | (case or {"case": None, "choices": []}))
        ran.outcomes["finding"] += 1
    shutil.rmtree(folder, ignore_errors=True)
    return ran


def _ended(target: Target, status: int, output: str) -> dict[str, Any]:
    """The finding of a fork that did not come to its end."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    how = signal.Signals(number).name if number else f"exit {os.waitstatus_to_exitcode(status)}"
    if number in HANGS:
        how = "hang"
    frames = [line.strip() for line in output.splitlines() if line.strip().startswith(f'File "{ROOT}') and "/.venv/" not in line]
    outside = [frame for frame in frames if "bench/fuzz" not in frame]
    where = (outside or frames or ["nowhere"])[0].replace(f"{ROOT}/", "").split(", line")[0].removeprefix('File "').rstrip('"')
    message = f"the case took more than {target.seconds:g} s" if how == "hang" else f"the process ended by {how}"
    return {"key": f"{how} {where}", "message": message, "traceback": output}


def run_one(target: Target, draw: Callable[[], Draw], folder: Path) -> Ran:
    """One case in a fork, waited for."""
    child = start(target, [draw], folder)
    return result(target, folder, os.waitpid(child, 0)[1])
