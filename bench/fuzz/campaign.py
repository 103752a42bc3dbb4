"""A campaign: chunks of cases of every target in forks, as many at once as there are jobs, until the time is over."""

import json
import os
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import forks
from .draw import Draw, Seeded
from .forks import CASES, SECONDS, Ran
from .shrink import shrink
from .target import Target

SHRINK_SECONDS = 20.0  # of a finding at most
SHRINKING = 0.5  # of the campaign's time, for all of them


@dataclass
class Report:
    """What a campaign found. counts and outcomes: by the title of a target. findings: the first of each key, with how often there were such."""

    seed: int
    seconds: float = 0.0
    cases: Counter = field(default_factory=Counter)
    outcomes: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, target: Target, ran: Ran) -> list[dict[str, Any]]:
        """Count what a fork did; the findings with a new key."""
        self.cases[target.title] += ran.cases
        self.outcomes[target.title].update(ran.outcomes)
        new = []
        for finding in ran.findings:
            key = f"{target.what}, {target.name}: {finding['key']}"
            if key not in self.findings:
                self.findings[key] = finding | {"target": target.title, "count": 0}
                new.append(self.findings[key])
            self.findings[key]["count"] += 1
        return new


def work_folder() -> Path:
    """A folder in memory where there is one."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="smi-fuzz-", dir=memory if os.access(memory, os.W_OK) else None))


def run(
    targets: Sequence[Target], minutes: float, seed: int, work: Path, jobs: int = 1, say: Callable[[str], object] = print, shrinking: bool = True
) -> Report:
    """Fuzz the targets. The next chunk is of the target that is furthest behind its share of the cases."""
    report, running, number = Report(seed), dict[int, tuple[Target, Path]](), 0
    began, each = time.monotonic(), min(SECONDS, 60 * minutes * jobs / (2 * len(targets)))  # every target has its turn in half of the time
    while running or time.monotonic() - began < 60 * minutes:
        if len(running) < jobs and time.monotonic() - began < 60 * minutes:
            target = _next(targets, report, [busy.title for busy, _ in running.values()])
            first = report.cases[target.title]
            draws = [partial(Seeded, seed, target.title, index) for index in range(first, first + CASES)]
            folder, number = work / f"fork-{number}", number + 1
            running[forks.start(target, draws, folder, each)] = target, folder
            continue
        child, status = os.wait()
        target, folder = running.pop(child)
        for finding in report.add(target, forks.result(target, folder, status)):
            say(f"{target.title}: {finding['key']}: {finding['message']}\n    {json.dumps(finding['case'])[:300]}")
    if shrinking:
        _shrink_all(targets, report, work, max(SHRINK_SECONDS, SHRINKING * 60 * minutes), say)
    report.seconds = time.monotonic() - began
    return report


def _next(targets: Sequence[Target], report: Report, busy: Sequence[str]) -> Target:
    free = [target for target in targets if target.title not in busy] or targets
    return min(free, key=lambda target: report.cases[target.title] / target.weight)


def _shrink_all(targets: Sequence[Target], report: Report, work: Path, seconds: float, say: Callable[[str], object]) -> None:
    by_title, each = {target.title: target for target in targets}, min(SHRINK_SECONDS, seconds / max(1, len(report.findings)))
    for key, finding in report.findings.items():
        if finding["case"] is None:
            continue
        small = shrink(by_title[finding["target"]], finding, work / "shrink", each)
        finding["shrunk"] = small["case"]
        finding["shrunk_choices"] = small["choices"]
        shutil.rmtree(work / "shrink", ignore_errors=True)
        say(f"{key}, shrunk: {json.dumps(small['case'])[:500]}")


def one(targets: Sequence[Target], title: str, case: dict, work: Path) -> Ran:
    """A case that an earlier campaign reported, in a fork."""
    target = next(target for target in targets if target.title == title)
    repeated = Target(target.what, target.name, target.part, lambda draw: case, target.check, target.weight, target.seconds)
    return forks.run_one(repeated, Draw, work / "one")
