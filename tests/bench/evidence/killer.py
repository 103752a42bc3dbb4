"""Runs the evidence command and kills it at random moments, then lets it end.

    python -m tests.bench.evidence.killer KILLS FOLDER FINISHED LOG ARGUMENTS...

The moments are spread over the work, of which the folder FINISHED shows how much there is. Writes to LOG what the command prints, and to LOG.states
what the cells and curves in FOLDER held after each kill. The command runs in forks of this process, so that kills fall into its work and not into
its imports.
"""

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from bench.evidence import run


def main(kills: int, folder: Path, finished: Path, log: Path, arguments: list[str]) -> int:
    import sklearn.datasets  # noqa: F401  what the command imports on its way
    import timm  # noqa: F401
    import torchmetrics.functional.classification  # noqa: F401

    random.seed(0)
    states = []
    for pieces in sorted(random.sample(range(_pieces(finished) * 3 // 4), kills)):
        _kill(_start(log, arguments), folder, pieces)
        states.append(read(folder))
    log.with_suffix(".states").write_text(json.dumps(states))
    return os.waitstatus_to_exitcode(os.waitpid(_start(log, arguments), 0)[1])


def _start(log: Path, arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os._exit(run.main(arguments))
    return child


def _kill(child: int, folder: Path, pieces: int) -> None:
    """When so much is in the folder, after a while that may end anywhere in what comes next."""
    while _pieces(folder) < pieces:
        time.sleep(0.01)
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("the command ended before it was killed")
    time.sleep(random.uniform(0, 0.4))
    os.kill(child, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        sys.exit("the command ended before it was killed")


def read(folder: Path) -> dict[str, str]:
    """Text of every cell and curve, by its path in the folder."""
    found = {}
    for path in (*folder.rglob("cell.json"), *folder.rglob("curve.jsonl")):
        with suppress(FileNotFoundError):  # removed while we looked
            found[str(path.relative_to(folder))] = path.read_text()
    return found


def _pieces(folder: Path) -> int:
    """What is known of all cells, and how often their students were measured."""
    return sum(len(json.loads(text)) if name.endswith("cell.json") else text.count("\n") for name, text in read(folder).items())


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *map(Path, sys.argv[2:5]), sys.argv[5:]))
