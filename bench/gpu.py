"""Everything that needs a GPU, in the order of its worth: correctness, then times of steps, whole runs and operations beside stock PyTorch.

    python -m bench.gpu                                all of it (make gpu); what an earlier call finished is skipped
    python -m bench.gpu --only attention               verdicts and cases of some operations
    python -m bench.gpu --first --out FOLDER           the most valuable within ten minutes, all files in one folder (make gpu-first)
    python -m bench.gpu --again                        also what an earlier call finished

Runs from the repository's root, also where the package is not installed and there is no git, with torch, triton and timm alone. Every section is a
process with a limit of its own; every row is on disk as soon as it is known. docs/gpu.md says what the files hold. Rows of the results are those of
bench/results/<device>.jsonl; `python -m bench.tables.verified` makes kernels/verified.json of the verdicts.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from smi.kernels import versions

from .measuring.code import ROOT, digest
from .sections import outputs, pack, plans
from .sections.progress import Progress
from .sections.runner import Run, Section

SECONDS = {False: 900.0, True: 560.0}  # of `make gpu`; of `make gpu-first`, with what starts and ends it within 570
WORK = ROOT / "out" / "gpu"  # progress and log where no folder is named; caches of the processes


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--first", action="store_true", help="the sections of a first contact")
    made.add_argument("--only", nargs="+", metavar="OPERATION", choices=versions.OPERATIONS, help="verdicts and cases of these operations")
    made.add_argument("--sections", nargs="+", metavar="NAME", help="these sections")
    made.add_argument("--seconds", type=float, help="end after this time")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="where all files go; without it rows go to bench/results, the others to out/gpu")
    made.add_argument("--earlier", type=Path, nargs="*", default=[], metavar="FOLDER", help="folders of earlier calls, to go on from")
    made.add_argument("--again", action="store_true", help="also what an earlier call finished")
    made.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)  # in small, on the CPU
    return made


def plan_of(options: argparse.Namespace) -> list[Section]:
    chosen = [section for section in (plans.FIRST if options.first else plans.ALL) if not options.sections or section.name in options.sections]
    if options.only:  # under another name: the whole section is not finished by them
        kept = [section for section in chosen if section.name in plans.OF_OPERATIONS]
        chosen = [replace(section, name=f"{section.name} of {', '.join(options.only)}") for section in kept]
    chosen = [section for section in chosen if not (options.no_compile and section.name.startswith("compiled"))]
    if options.rehearse:  # processes start one after another there
        chosen = [replace(section, limit=10 * section.limit, parts=section.parts[-2:]) for section in chosen]
    return chosen


def environment(rehearse: bool) -> dict[str, str]:
    """Of the processes: their own caches, which end with the machine or are this checkout's."""
    caches = {"TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "cache", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    found = os.environ | {name: os.environ.get(name, str(WORK / folder)) for name, folder in caches.items()}
    return found | {"PYTHONUNBUFFERED": "1"} | ({"OMP_NUM_THREADS": "1", "SMI_BACKEND": "stock"} if rehearse else {})


def has_gpu() -> bool:
    import torch  # takes seconds: the first section's process loads it meanwhile

    return torch.cuda.is_available()


def main(arguments: list[str] | None = None) -> int:
    """0 where all is finished and right, 1 where something is left or wrong, 2 where there is no GPU."""
    began = time.monotonic()
    options = parser().parse_args(arguments)
    if not options.rehearse and not has_gpu():
        print("bench.gpu measures on a CUDA GPU and torch finds none here; what needs no GPU is in make test and make kernels", file=sys.stderr)
        return 2
    folder = options.out or WORK
    folder.mkdir(parents=True, exist_ok=True)
    call = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    earlier = [*pack.earlier(), *(each / outputs.PROGRESS for each in options.earlier)]
    progress = Progress(folder / outputs.PROGRESS, f"{digest()} {time.time()}" if options.again else digest(), call, earlier)
    given = {"device": "cpu" if options.rehearse else "cuda", "operations": options.only, "rows_in_results": options.out is None}
    seconds = (options.seconds or SECONDS[options.first]) - (time.monotonic() - began)
    left = Run(plan_of(options), folder, progress, seconds, given, environment(options.rehearse)).run()
    if left:
        print(f"not finished: {', '.join(left)}; the same command goes on")
    for fault in outputs.faults(folder) if options.out else []:
        print(f"in {folder}: {fault}")
    wrong = [name for row in progress.rows() for name in row.get("wrong", ())]
    return int(bool(left or wrong))


if __name__ == "__main__":
    sys.exit(main())
