"""Runs sections one after another, each as processes of its own that are ended at the section's limit.

- A section may use what those before it left of their limits; the limits of those after it are kept for them.
- The processes of the next section start, and import what they need, while one runs; then they wait for their turn.
- A process that dies is started again while there is time, without the case that it died of.
- A section is finished when its rows say so on disk. The next call with the same code skips it, and goes on with the cases that the others left.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..measuring.code import ROOT
from . import outputs
from .progress import CRASHED, CUT, FINISHED, Key, Progress

LEAST_SECONDS = 5.0  # below which a section is not begun
MOST_STARTS = 6  # of one part
WHOLE = "all"  # the part of a section that has only one


@dataclass(frozen=True)
class Section:
    """name; limit: seconds; run: "module:function", called with a `worker.Work`; parts: processes side by side; options: for the function."""

    name: str
    limit: float
    run: str
    parts: tuple[str, ...] = (WHOLE,)
    options: Mapping[str, object] = field(default_factory=dict)


class Log:
    """What the processes print, in one file of bounded size."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.size = path.stat().st_size if path.exists() else 0

    def follow(self, name: str, pipe) -> None:
        """Append every line of a pipe until its end, in a thread of its own."""

        def copy() -> None:
            for line in pipe:
                text = f"[{name}] ".encode() + line
                with self.lock:
                    if self.size + len(text) <= outputs.LOG_BYTES:
                        self.size += len(text)
                        with self.path.open("ab") as file:
                            file.write(text)
            pipe.close()

        threading.Thread(target=copy, daemon=True).start()


class Part:
    """A process of a section, waiting for its turn since it was made."""

    def __init__(self, section: Section, part: str, run: "Run"):
        self.section, self.part, self.run, self.starts, self.ended = section, part, run, 0, False
        self.key = Key(section.name, part)
        self.start()

    def start(self) -> None:
        self.starts += 1
        progress = self.run.progress
        self.before = len(progress.rows())
        given = {
            "run": self.section.run, "section": self.section.name, "part": self.part, "folder": str(self.run.folder), "progress": str(progress.path),
            "code": progress.code, "call": progress.call, "earlier": list(map(str, progress.earlier)),
            "options": self.run.options | dict(self.section.options),
        }  # fmt: skip
        command = [sys.executable, "-m", "bench.sections.worker", json.dumps(given)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, cwd=ROOT, env=self.run.environment, start_new_session=True, **pipes)
        self.run.log.follow(f"{self.section.name} {self.part}", self.process.stdout)

    def go(self, seconds: float) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died while it waited: `step` says so
            self.process.stdin.write(f"{seconds:.1f}\n".encode())
            self.process.stdin.flush()

    def kill(self) -> None:
        """End the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def step(self, left: float) -> None:
        """Look after the process: note a death, and start another one where there is time."""
        if self.ended or self.process.poll() is None:
            return
        code, progress = self.process.returncode, self.run.progress
        self.kill()  # its children
        if code == 0:
            self.ended = True
            return
        moved = len(progress.rows()) > self.before
        case = progress.open_case(*self.key[:2])
        progress.mark(self.key._replace(case=case), CRASHED if case else CUT, exit=code)
        self.ended = not moved or self.starts >= MOST_STARTS or left < LEAST_SECONDS
        if not self.ended:
            self.start()
            self.go(left)

    def cut(self) -> None:
        """End it at the limit."""
        if self.ended:
            return
        self.kill()
        if self.run.progress.states().get(self.key) != FINISHED:
            self.run.progress.mark(self.key._replace(case=self.run.progress.open_case(*self.key[:2])), CUT)


class Run:
    """All sections within a time. options: for every section; environment: of the processes."""

    def __init__(self, plan: Sequence[Section], folder: Path, progress: Progress, seconds: float, options: dict, environment: dict[str, str]):
        self.folder, self.progress, self.options, self.environment = folder, progress, options, environment
        self.end = time.monotonic() + seconds
        self.plan = [section for section in plan if self.unfinished(section)]
        self.skipped = [section.name for section in plan if section not in self.plan]
        self.log = Log(folder / outputs.LOG)

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self) -> list[str]:
        """Names of the sections that are not finished. Prints a line for each section, also into the folder."""
        if self.skipped:
            self.say(f"finished by an earlier call: {', '.join(self.skipped)}")
        following = self.parts_of(self.plan[0]) if self.plan else []
        for place, section in enumerate(self.plan):
            parts, kept = following, sum(s.limit for s in self.plan[place + 1 :])
            following = self.parts_of(self.plan[place + 1]) if place + 1 < len(self.plan) else []
            limit = min(self.left(), max(section.limit, self.left() - kept))
            began = time.monotonic()
            if limit >= LEAST_SECONDS:
                self.watch(parts, began + limit)
            for part in parts:
                part.kill() if limit < LEAST_SECONDS else part.cut()
            self.say(self.line(section, time.monotonic() - began, limit))
        return [section.name for section in self.plan if self.unfinished(section)]

    def unfinished(self, section: Section) -> list[str]:
        """Parts of a section that no call has finished."""
        states = self.progress.states()
        return [part for part in section.parts if states.get(Key(section.name, part)) != FINISHED]

    def parts_of(self, section: Section) -> list[Part]:
        """Processes of a section, but for the parts that an earlier call finished."""
        return [Part(section, part, self) for part in self.unfinished(section)]

    def watch(self, parts: list[Part], end: float) -> None:
        """Let parts run until all have ended or the time has come."""
        for part in parts:
            part.go(end - time.monotonic())
        while time.monotonic() < end and not all(part.ended for part in parts):
            for part in parts:
                part.step(end - time.monotonic())
            time.sleep(0.02)

    def line(self, section: Section, seconds: float, limit: float) -> str:
        """What a section found, in a line."""
        rows = [row for row in self.progress.rows() if row["section"] == section.name]
        last = {(row["part"], row["case"]): row for row in rows}
        done = [row for (_, case), row in last.items() if case and row["state"] == FINISHED]
        open_parts = self.unfinished(section)
        found = [row["found"] for row in rows if row.get("found")]
        wrong = [name for row in rows for name in row.get("wrong", ())]
        found += [f"WRONG: {', '.join(wrong[:4])}" + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")] if wrong else []
        bad = [f"{row['case']} {row['state']}" for (_, case), row in last.items() if case and row["state"] != FINISHED]
        if limit < LEAST_SECONDS:
            head = "no time"
        else:
            names = f" ({', '.join(open_parts)})" if open_parts and len(section.parts) > 1 else ""
            head = f"not finished{names}" if open_parts else "finished"
        text = "; ".join([f"{len(done)} cases", *found, *bad[:6]])
        return f"{section.name}: {head} in {seconds:.0f} s, {text}. {max(0.0, self.left()):.0f} s left"

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.folder / outputs.SUMMARY).open("a") as file:
            file.write(text + "\n")
