"""Sections of a device that takes its time, and some that misbehave. `python -m tests.bench.sections.fake FOLDER SECONDS` runs the former."""

import os
import subprocess
import sys
import time
from pathlib import Path

from bench.sections import outputs
from bench.sections.progress import Progress
from bench.sections.runner import Run, Section
from bench.sections.worker import Work

STEP = 0.15  # seconds of a case
RESULTS = "fake.jsonl"


def slow(work: Work) -> None:
    """Five cases, two rows each."""
    work.cases({f"c{i}": lambda i=i: time.sleep(STEP) or [{"case": i, "row": row, "part": work.part} for row in (1, 2)] for i in range(5)}, RESULTS)
    work.found.append("all well")


def wrong(work: Work) -> None:
    """One case whose result is not right."""
    work.cases({"first": lambda: [{"case": "first"}]}, RESULTS)
    work.wrong += [f"w{i}" for i in range(6)]


def hanging(work: Work) -> None:
    """The second case never ends, and has a child that does not either."""
    cases = {"first": lambda: [{"case": "first"}], "hangs": lambda: subprocess.run(["sleep", "1000"]) and None, "last": lambda: [{"case": "last"}]}
    work.cases(cases, RESULTS)


def crashing(work: Work) -> None:
    """The second case kills its process, the third raises, and after the fourth the device answers no more."""
    cases = {
        "first": lambda: [{"case": "first"}],
        "dies": lambda: os._exit(11),
        "raises": lambda: 1 / 0,
        "poisons": lambda: setattr(work, "alive", lambda: 1 / 0) or [{"case": "poisons"}],
        "last": lambda: [{"case": "last"}],
    }
    work.cases(cases, RESULTS)


def section(name: str, function: str, limit: float = 10.0, parts: tuple[str, ...] = ("all",)) -> Section:
    return Section(name, limit, f"tests.bench.sections.fake:{function}", parts)


PLAN = [section("one", "slow"), section("two", "slow", parts=("left", "right")), section("three", "slow")]


def run(folder: Path, seconds: float, plan: list[Section] | None = None, code: str = "code", earlier: tuple[Path, ...] = ()) -> list[str]:
    progress = Progress(folder / outputs.PROGRESS, code, f"{time.time()}", earlier)
    return Run(PLAN if plan is None else plan, folder, progress, seconds, {}, dict(os.environ)).run()


if __name__ == "__main__":
    run(Path(sys.argv[1]), float(sys.argv[2]))
