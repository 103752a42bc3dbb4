"""The regression gates: exit code 1, and a readable table, when something got worse.

    python -m bench.check                    all gates (make bench-check)
    python -m bench.check --quick            all, but of the ratios only those to `eager`, without torch.compile
    python -m bench.check --exact            only what is exact: FLOPs, bytes of saved activations, the compile gate
    python -m bench.check --ratios           only the ratios, on a GPU the times
    python -m bench.check --full             the compile gate of all kernels (tens of minutes) instead of a cheap one
    python -m bench.check --update           record a new baseline: look at the differences first
    python -m bench.check --against main     ratios against another commit, measured here and now in a worktree: for machines without a baseline
    python -m bench.check --repeat 20        repeat the ratios alone and count the alarms
    python -m bench.check --slow 1.3         plant a regression of 30 %: every ratio must be reported

Baselines are in bench/baseline/: exact.json for all machines, and ratios for a class of processors. On a GPU the times of our steps are held against
the committed rows of the same device instead (bench/results/<device>.jsonl). bench/gates/ratios.py says why the ratios are stable on a busy machine.
"""

import argparse
import sys
from pathlib import Path

import torch

from .gates.compiled import check_compiled
from .gates.exact import check_exact
from .gates.gpu_times import check_gpu_times
from .gates.ratios import check_ratios
from .measuring.record import BASELINE


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--exact", action="store_true", help="only the exact gates")
    only.add_argument("--ratios", action="store_true", help="only the ratios, on a GPU the times")
    parser.add_argument("--quick", action="store_true", help="without torch.compile")
    parser.add_argument("--full", action="store_true", help="compile all kernels")
    parser.add_argument("--update", action="store_true", help="record a new baseline")
    parser.add_argument("--against", metavar="COMMIT", help="take the baseline of the ratios from another commit, measured now")
    parser.add_argument("--repeat", type=int, metavar="N", help="repeat the ratio check and count the alarms")
    parser.add_argument("--slow", type=float, default=1.0, metavar="FACTOR", help="make our side slower, to see it reported")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="folder of the baselines")
    options = parser.parse_args(arguments)
    if options.exact and (options.repeat or options.against):
        parser.error("--repeat and --against are about ratios: leave out --exact")
    failed = 0
    if not options.ratios and not options.repeat:
        failed += check_exact(options.baseline / "exact.json", options.update)
        failed += check_compiled(options.full)
    if not options.exact and torch.cuda.is_available():
        failed += check_gpu_times()
    elif not options.exact:
        failed += check_ratios(
            options.baseline,
            compiled=not (options.quick or options.against),
            update=options.update,
            against=options.against,
            repetitions=options.repeat,
            slow=options.slow,
        )
    print("nothing regressed" if not failed else f"{failed} regressed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
