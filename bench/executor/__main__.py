"""Execute compiled kernels on the CPU: forward and backward of every shipped tile, a few blocks each, held against float64 by the error rule.

    python -m bench.executor                          everything: sm_80 and sm_90, bf16, float32 and float16, csrc's attention
    python -m bench.executor --shipped --arch 90      the programs of the compile gate, one block or a few of each (what `make test` runs)
    python -m bench.executor --only attention --part 1/8

Exit code 1 where a result is wrong, a race or a missing fence was seen, an instruction is not modelled, or a shipped tile was not executed.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from smi.kernels import versions

from ..gates import nvcc
from ..gates.compiled import part_of

if TYPE_CHECKING:
    from . import run

ARCHITECTURES = (90, 80)
OPERATIONS = (*versions.OPERATIONS, "csrc")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", metavar="OPERATION", choices=OPERATIONS, default=OPERATIONS, help="these operations, or csrc")
    made.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES, help="capability times 10")
    made.add_argument("--shipped", action="store_true", help="execute the compile gate's programs instead of each launch's own; no float16")
    made.add_argument("--part", type=part_of, metavar="I/N", default=(1, 1), help="the I-th of N parts")
    made.add_argument("--named", default="", help="only what has this in its name")
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser().error("TRITON_INTERPRET=1 is set: interpreted kernels are not compiled, unset it")
    from . import run  # imports Triton

    started, failed, done, unexecuted = time.perf_counter(), 0, 0, []
    for outcome in outcomes(options):
        print(outcome, flush=True)
        failed, done = failed + bool(outcome.wrong), done + 1
    for operation in options.only:
        for architecture in options.arch if operation != "csrc" else ():
            works, cases = run.chosen_works(operation, architecture, False)
            covered = {name for work in works for name in work.cases}
            unexecuted += [f"sm_{architecture} {case.name}" for case in cases if case.name not in covered]
    for name in unexecuted:
        print(f"shipped, but nothing here executes it: {name}")
    print(f"{done} executed, {failed} wrong, {time.perf_counter() - started:.0f} s")
    return 1 if failed or unexecuted else 0


def outcomes(options: argparse.Namespace) -> Iterator["run.Outcome"]:
    """What the options ask for, one after the other."""
    from . import csrc, run

    def mine(works: list) -> list:
        return [work for i, work in enumerate(works) if i % options.part[1] == options.part[0] - 1 and options.named in work.name]

    for operation in options.only:
        if operation == "csrc":
            if not nvcc.found():
                print("csrc is not executed: there is no nvcc")
            elif csrc.ARCHITECTURE in options.arch:
                for width in csrc.WIDTHS:
                    texts = {width: csrc.compile_to_ptx(width)}
                    yield from (run.execute_csrc(work, texts) for work in mine(csrc.works((width,))))
            continue
        for architecture in options.arch:
            for half in (False,) if options.shipped else (False, True):
                works, cases = run.chosen_works(operation, architecture, half)
                yield from (run.execute(work, architecture, cases if options.shipped else []) for work in mine(works))


if __name__ == "__main__":
    sys.exit(main())
