"""Everything that needs a GPU, in one command of at most eight minutes: correctness of every version, then times beside stock PyTorch.

    python -m bench.gpu                          all operations, then steps, whole runs and memory
    python -m bench.gpu --only attention         some operations (resumes what an earlier run left out)
    python -m bench.gpu --seconds 120            a shorter run: cases that do not fit are named and left out

Runs from the repository's root, also where the package is not installed, with torch, triton and timm alone. Appends to
bench/results/<device>.jsonl: one row per verdict (correct, and how much faster than stock PyTorch), one per side of a case, and those of `bench.run`.
`python -m bench.tables.verified` then makes kernels/verified.json of the verdicts.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from smi.kernels import versions

from .cases import suites
from .cases.operations import GPU_BATCH, cases
from .measuring import record
from .measuring.budget import Budget
from .measuring.ceilings import measure_ceilings
from .measuring.operations import case_rows, measure
from .measuring.verdicts import RESERVE, chosen, row, verdicts
from .run import measure_suites
from .tables.show import show, show_verdicts

SECONDS = 450.0  # of the eight minutes
OPERATIONS_SHARE = 0.45  # of them, where steps, whole runs and memory are measured too
RESERVE_COMPILED = 60.0  # the same with torch.compile


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="OPERATION", choices=versions.OPERATIONS, help="these operations")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="end after this time")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu measures on a CUDA GPU and torch finds none here; what needs no GPU is in make test and make kernels", file=sys.stderr)
        return 2
    device, budget = torch.device("cuda", torch.cuda.current_device()), Budget(options.seconds)
    if options.only:
        return measure_operations(device, options.only, options.seconds, not options.no_compile)
    code = measure_operations(device, versions.OPERATIONS, OPERATIONS_SHARE * options.seconds, not options.no_compile)
    measure_inversions(device, budget)
    return code


def measure_operations(device: torch.device, operations: Sequence[str], seconds: float, compiled: bool) -> int:
    """Verdicts, then cases, each written as soon as it is known; exit code 1 where a version is not correct. compiled: time torch.compile, too."""
    budget = Budget(seconds)
    about = record.cuda_environment(device) | {"time": record.now()}
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    path = record.results_file(about["device"])
    ceilings = measure_ceilings(device)
    about |= {"copy_gigabytes_per_second": ceilings.bytes / 1e9, "product_teraflops": ceilings.flops / 1e12}
    print(f"ceilings: copy {ceilings.bytes / 1e9:.0f} GB/s, bfloat16 GEMM {ceilings.flops / 1e12:.0f} TFLOP/s")
    found = verdicts(device, operations, budget)
    record.append(path, [about | row(v, device) for v in found])
    show_verdicts(found)
    left_out, compiled_already = [], set()
    for case in cases(GPU_BATCH, operations):
        if budget.left() < RESERVE:
            left_out.append(case.name)
            continue
        compile_it = compiled and case.operation not in compiled_already and budget.left() > RESERVE_COMPILED
        compiled_already |= {case.operation} if compile_it else set()
        measured = case_rows(case, *measure(case, device, ceilings, compiled=compile_it), chosen(case, found))
        record.append(path, [about | each for each in measured])
        show(measured)
        torch.cuda.empty_cache()
    if left_out:
        print(f"no time left for {', '.join(left_out)}: run again with --only")
    print(f"results appended to {path}; python -m bench.tables.verified makes the table that the package ships")
    return 1 if any(v.wrong for v in found) else 0


def measure_inversions(device: torch.device, budget: Budget) -> None:
    """Steps, whole runs and memory in the time that is left, as `python -m bench.run` does."""
    about = record.run_environment(device)
    left_out = measure_suites(suites.on_gpu(), ("memory", "steps", "whole"), device, budget, about, record.results_file(about["device"]))
    if left_out:
        print(f"no time left for {'; '.join(left_out)}: python -m bench.run --suite")


if __name__ == "__main__":
    sys.exit(main())
