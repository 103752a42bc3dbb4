"""Random models, settings and damaged files against the package, until the time is over.

    python -m bench.fuzz --minutes 10                         everything
    python -m bench.fuzz --minutes 5 --what files --seed 7    damaged files alone, from another seed
    python -m bench.fuzz --what files --only checkpoint       what has a text in its name
    python -m bench.fuzz --again out/fuzz/findings.jsonl      the cases that an earlier campaign reported

A finding is a crash, a hang, an exception where one sentence is due, a wrong gradient, an executed payload, or memory without bound. Each is printed
with its case, shrunk at the end, and kept in the folder (--out). Exit code 1 where there was one. Rows are appended to bench/results/<device>.jsonl.
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch

from ..measuring import record
from . import campaign
from .campaign import Report
from .target import Target

WHAT = ("models", "settings", "files")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--only", metavar="TEXT", default="", help="what has it in its name: a kind of file, a door, a method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="forks at once, each with one thread")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"), metavar="FOLDER", help="where findings are kept")
    parser.add_argument("--again", type=Path, metavar="FILE", help="run the cases of a file of findings, and nothing else")
    parser.add_argument("--no-write", action="store_true", help="append no rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads do not survive a fork
    work = campaign.work_folder()
    try:
        chosen = every_target(options.what, work, options.only)
        if options.again:
            return repeat(chosen, options.again, work)
        report = campaign.run(chosen, options.minutes, options.seed, work, options.jobs)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "findings.jsonl").open("a") as file:
        file.writelines(json.dumps({"key": key} | finding) + "\n" for key, finding in report.findings.items())
    if not options.no_write:
        about = record.run_environment(torch.device("cpu"))
        record.append(record.results_file(about["device"]), [about | row for row in rows(report, chosen)])
    show(report, options.out)
    return 1 if report.findings else 0


def every_target(what: list[str], work: Path, only: str = "") -> list[Target]:
    """The targets of these campaigns; what they need is loaded and made."""
    from smi.csrc import host

    from . import files, models, settings

    for library in (host.CPU, host.AUTOGRAD):
        library.ensure_built()
    made = {"models": models.targets, "settings": settings.targets, "files": files.targets}
    return [target for name in what for target in made[name](work, only)]


def rows(report: Report, chosen: list[Target]) -> list[dict]:
    """A row for models, settings and files each: how many cases of every name and part, and what became of them."""
    found = []
    for what in dict.fromkeys(target.what for target in chosen):
        mine = [target for target in chosen if target.what == what]
        parts: dict[str, dict[str, int]] = {}
        for target in mine:
            parts.setdefault(target.name, {})[target.part] = report.cases[target.title]
        outcomes = sum((report.outcomes[target.title] for target in mine), Counter())
        keys = [key for key in report.findings if key.startswith(f"{what}, ")]
        about = {"kind": "fuzz", "what": what, "seed": report.seed, "seconds": report.seconds, "cases": sum(outcomes.values())}
        found.append(about | {"outcomes": dict(outcomes), "findings": keys, "parts": parts})
    return found


def show(report: Report, out: Path) -> None:
    """The campaign in a few lines."""
    outcomes = sum(report.outcomes.values(), Counter())
    print(f"{sum(report.cases.values())} cases in {report.seconds:.0f} s: {', '.join(f'{count} {name}' for name, count in outcomes.most_common())}")
    for key, finding in report.findings.items():
        print(f"{finding['count']}x {key}: {finding['message']}")
    print(f"{len(report.findings)} findings{f', with their cases in {out}/findings.jsonl' if report.findings else ''}")


def repeat(chosen: list[Target], file: Path, work: Path) -> int:
    """Run the cases of a file of findings."""
    bad = 0
    for line in file.read_text().splitlines():
        finding = json.loads(line)
        if finding["target"] not in [target.title for target in chosen] or finding["case"] is None:
            continue
        ran = campaign.one(chosen, finding["target"], finding.get("shrunk") or finding["case"], work)
        bad += bool(ran.findings)
        print(f"{finding['key']}: {ran.findings[0]['key'] if ran.findings else ', '.join(ran.outcomes)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
