"""The process of one part of a section: imports, waits for the word to go, works through its cases, each on disk as soon as it is known.

Started by `runner` as `python -m bench.sections.worker JSON`, with a pipe as standard input: a line of it says how many seconds there are, its end
that the runner is gone.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from . import outputs
from .progress import BEGUN, FAILED, FINISHED, Key, Progress

DEAD = 3  # exit code where the device answers no more: another process goes on


@dataclass
class Work:
    """What a section's function is given. folder: of the files. options: of the section and the command line."""

    section: str
    part: str
    folder: Path
    progress: Progress
    options: dict
    end: float = 0.0
    rows: list[dict] = field(default_factory=list)  # of this process
    found: list[str] = field(default_factory=list)  # for the terminal's line
    wrong: list[str] = field(default_factory=list)  # what is not right, by name: the command fails
    alive: Callable[[], object] = lambda: None  # raises where the device answers no more

    def left(self) -> float:
        """Seconds until the limit."""
        return self.end - time.monotonic()

    def cases(self, cases: Mapping[str, Callable[[], list[dict] | None]], file: str, about: Mapping[str, object] | None = None) -> None:
        """Run every case that is left, and append its rows to a file of the folder. An error ends its case, not the others; a device that is gone
        ends the process."""
        for name in self.progress.order(self.section, self.part, cases):
            key, began = Key(self.section, self.part, name), time.monotonic()
            self.progress.mark(key, BEGUN)
            try:
                rows = [{**(about or {}), **row} for row in cases[name]() or []]
                outputs.append(self.folder / file, rows)
                self.rows += rows
                self.progress.mark(key, FINISHED, seconds=round(time.monotonic() - began, 2))
            except Exception as error:  # reported in the row and the log; the other cases are still measured
                traceback.print_exc()
                self.progress.mark(key, FAILED, seconds=round(time.monotonic() - began, 2), error=f"{type(error).__name__}: {error}"[:500])
                self.found.append(f"{name} failed: {type(error).__name__}")
            self.ensure_alive()

    def ensure_alive(self) -> None:
        try:
            self.alive()
        except Exception:  # a sticky error: every later call of this process fails too
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(DEAD)


def end_with_runner() -> None:
    """End this process and its children when the runner is gone."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def read_line() -> str:
    """The next line of standard input, no byte further."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            sys.exit(1)
        line += byte
    return line.decode()


def function_of(name: str) -> Callable[[Work], None]:
    """ "module:function" """
    module, function = name.split(":")
    return getattr(import_module(module), function)


def main() -> None:
    given = json.loads(sys.argv[1])
    run = function_of(given["run"])
    seconds = float(read_line())
    end_with_runner()
    progress = Progress(Path(given["progress"]), given["code"], given["call"], map(Path, given["earlier"]))
    work = Work(given["section"], given["part"], Path(given["folder"]), progress, given["options"], time.monotonic() + seconds)
    run(work)
    progress.mark(Key(work.section, work.part), FINISHED, found="; ".join(work.found), wrong=work.wrong)


if __name__ == "__main__":
    main()
