"""The suites: ours, `eager` and `compiled` in turn, appended to bench/results/<device>.jsonl.

    python -m bench.run                              everything, on the CPU within 15 minutes (make bench)
    python -m bench.run --quick                      the key figures within two minutes (make bench-quick)
    python -m bench.run --suite steps whole          some suites: steps, whole, memory, scaling, operations
    python -m bench.run --only base --seconds 300    cases whose name contains a text, another time

Rounds are sized by the time there is; cases that do not fit are named and left out. `python -m bench.paper` makes tables and plots of the rows.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .cases import suites
from .measuring import record
from .measuring.budget import Budget
from .measuring.ceilings import ceilings_by_dtype
from .measuring.inversions import measure_step, measure_whole
from .measuring.memory import measure_memory
from .measuring.operations import measure_on_cpu
from .tables.show import show

SECONDS = {False: 840.0, True: 105.0}  # of 15 and of 2 minutes
ORDER = ("memory", "steps", "whole", "scaling", "operations")
LEAST_SECONDS = {"memory": 5.0, "steps": 2.0, "whole": 5.0, "scaling": 2.0, "operations": 5.0}  # below which a case is not begun


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=ORDER, default=list(ORDER), help="these suites")
    parser.add_argument("--quick", action="store_true", help="the key figures only")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--seconds", type=float, help="end after about this time")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--no-write", action="store_true", help="print, and append nothing")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = suites.quick_on_cpu() if options.quick else suites.on_cpu() if options.device.type == "cpu" else suites.on_gpu()
    budget = Budget(options.seconds or SECONDS[options.quick])
    about = record.run_environment(options.device)
    path = None if options.no_write else record.results_file(about["device"])
    left_out = measure_suites(chosen, options.suite, options.device, budget, about, path, options.only)
    if left_out:
        print(f"no time left for {len(left_out)} cases: {'; '.join(left_out)}. Run again with --suite, --only or --seconds")
    print(f"rows appended to {path}; python -m bench.paper makes the tables" if path else "nothing written")
    return 0


def measure_suites(
    chosen: suites.Suites, names: Iterable[str], device: torch.device, budget: Budget, about: dict, path: Path | None, only: str | None = None
) -> list[str]:
    """Measure the named suites, each within its share of the time that is left; rows are written and shown as they come. Names of cases left out."""
    ceilings = ceilings_by_dtype(device)
    print(", ".join(f"{name}: GEMM peak {ceiling.flops / 1e9:.0f} GFLOP/s" for name, ceiling in ceilings.items()))
    about = about | {"product_gigaflops": {name: ceiling.flops / 1e9 for name, ceiling in ceilings.items()}}
    about |= {"copy_gigabytes_per_second": ceilings["float32"].bytes / 1e9}
    measures: dict[str, Callable[[object, float], list[dict]]] = {
        "memory": lambda case, seconds: measure_memory(case, device),
        "steps": lambda case, seconds: measure_step(case, device, seconds, ceilings),
        "scaling": lambda case, seconds: measure_step(case, device, seconds, ceilings),
        "whole": lambda case, seconds: measure_whole(case, device, seconds, ceilings),
        "operations": lambda case, seconds: measure_on_cpu(case, ceilings),
    }
    left_out = []
    for suite in (name for name in ORDER if name in set(names)):
        end = Budget(suites.Suites.shares[suite] * budget.left())
        cases = [case for case in getattr(chosen, suite) if only is None or only in case.name]
        for place, case in enumerate(cases):
            if end.left() < LEAST_SECONDS[suite]:
                left_out += [f"{suite}: {name}" for name in suites.names(cases[place:])]
                break
            rows = measures[suite](case, end.left() / max(2, len(cases) - place))
            record.append(path, [about | {"suite": suite} | row for row in rows])
            show(rows)
    return left_out


if __name__ == "__main__":
    sys.exit(main())
