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
import time
from importlib import import_module

import torch

from smi.kernels import dispatch, verification

from .cases import operations as cases
from .measuring import operations as runner
from .measuring.record import RESULTS, append, results_file
from .measuring.record import cuda_environment as environment
from .tables.terminal import print_table

SECONDS = 450.0  # of the eight minutes
OPERATIONS_SHARE = 0.45  # of them, where steps, whole runs and memory are measured too
RESERVE = 20.0  # seconds that one case may take
RESERVE_COMPILED = 60.0  # the same with torch.compile


def verdicts(device: torch.device, operations: list[str], budget: runner.Budget) -> list[verification.Verdict]:
    """Correctness and speed of every version on its typical arguments, in every dtype."""
    found = []
    for operation in operations:
        sizes = getattr(import_module(f"smi.kernels.{operation}.op"), "SIZES", ("any",))
        for version in (v for v in dispatch.NEEDS_VERDICT if dispatch.exists(operation, v)):
            for dtype in map(verification.short, verification.DTYPES):
                for size in sizes:
                    if budget.left() < RESERVE:
                        print(f"no time left to verify {operation} {version} {dtype} {size}")
                        continue
                    found.append(verification.self_check(operation, version, device, dtype, size))
    return found


def show_verdicts(found: list[verification.Verdict]) -> None:
    rows = [[f"{v.operation} {v.version}", v.dtype, v.size, "yes" if v.correct else "NO", f"{v.speedup:.2f}x", v.note[:90]] for v in found]
    print_table("versions against float64, and against stock PyTorch", ["version", "dtype", "sizes", "correct", "speed", "note"], rows)


def case_rows(case: cases.Case, measured: list[runner.Measurement], refused: dict[str, str], resolved: str) -> list[dict]:
    """Result rows of one case."""
    about = {"kind": "case", "operation": case.operation, "case": case.name, "dtype": verification.short(case.dtype), "resolved": resolved}
    timed = [
        about
        | {
            "side": m.side,
            "warm_us": [q * 1e6 for q in m.warm],
            "cold_us": [q * 1e6 for q in m.cold] if m.cold else None,
            "gigabytes_per_second": m.gigabytes_per_second,
            "teraflops": m.teraflops,
            "share_of_floor": m.share,
            "peak_bytes": m.peak_bytes,
        }
        for m in measured
    ]
    return timed + [about | {"side": side, "not_timed": reason} for side, reason in refused.items()]


def show_case(case: cases.Case, measured: list[runner.Measurement], refused: dict[str, str], resolved: str) -> None:
    rows = [
        [m.side, f"{m.warm.median * 1e6:.1f}", f"{m.cold.low * 1e6:.1f} {m.cold.median * 1e6:.1f} {m.cold.high * 1e6:.1f}" if m.cold else "",
         f"{m.gigabytes_per_second:.3g}", f"{m.teraflops:.3g}", f"{m.share:.0%}", f"{m.peak_bytes / 2**20:.0f}"]
        for m in measured
    ]  # fmt: skip
    how = " in a CUDA graph" if any(m.cold for m in measured) else ""
    title = f"{case.operation}, {case.name}, {verification.short(case.dtype)}, forward and backward{how} (auto takes {resolved})"
    print_table(title, ["side", "warm us", "cold us 20 50 80 %", "GB/s", "TFLOP/s", "of floor", "MiB"], rows)
    for side, reason in refused.items():
        print(f"  {side}: not timed, {reason}")


def chosen(case: cases.Case, found: list[verification.Verdict]) -> str:
    """What the verdicts of this run make `auto` choose for a case."""
    key = (case.operation, verification.short(case.dtype), case.size)
    mine = [v for v in found if (v.operation, v.dtype, v.size) == key and v.chosen]
    return max(mine, key=lambda v: v.speedup).version if mine else "stock"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="OPERATION", choices=dispatch.OPERATIONS, help="these operations")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="end after so many seconds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu measures on a CUDA GPU and torch finds none here; what needs no GPU is in make test and make kernels", file=sys.stderr)
        return 2
    device, budget = torch.device("cuda", torch.cuda.current_device()), runner.Budget(options.seconds)
    if options.only:
        return measure_all(device, options.only, options)
    options.seconds *= OPERATIONS_SHARE
    code = measure_all(device, list(dispatch.OPERATIONS), options)
    measure_methods(device, budget)
    return code


def measure_methods(device: torch.device, budget: runner.Budget) -> None:
    """Steps, whole runs and memory in the time that is left, as `python -m bench.run` does."""
    from . import run  # they need timm
    from .cases import suites  # they need timm
    from .measuring import record  # they need timm

    about = record.environment(device)
    left_out = run.measure_suites(suites.on_gpu(), ("memory", "steps", "whole"), device, budget, about, results_file(about["device"], RESULTS))
    if left_out:
        print(f"no time left for {'; '.join(left_out)}: python -m bench.run --suite")


def measure_all(device: torch.device, operations: list[str], options: argparse.Namespace) -> int:
    """Verdicts, then cases, each written as soon as it is known; exit code 1 where a version is not correct."""
    budget = runner.Budget(options.seconds)
    about = environment(device) | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    path = results_file(about["device"], RESULTS)
    ceiling = runner.ceilings(device)
    about |= {"copy_gigabytes_per_second": ceiling.bytes / 1e9, "product_teraflops": ceiling.operations / 1e12}
    print(f"ceilings: copy {ceiling.bytes / 1e9:.0f} GB/s, bfloat16 product {ceiling.operations / 1e12:.0f} TFLOP/s")
    found = verdicts(device, operations, budget)
    append(path, [about | {"kind": "verdict"} | v._asdict() for v in found])
    show_verdicts(found)
    left_out, compiled_already = [], set()
    for case in cases.select(operations):
        if budget.left() < RESERVE:
            left_out.append(f"{case.operation} {case.name}")
            continue
        compiled = not options.no_compile and case.operation not in compiled_already and budget.left() > RESERVE_COMPILED
        compiled_already |= {case.operation} if compiled else set()
        measured, refused = runner.measure(case, device, ceiling, compiled=compiled)
        resolved = chosen(case, found)
        append(path, [about | row for row in case_rows(case, measured, refused, resolved)])
        show_case(case, measured, refused, resolved)
        torch.cuda.empty_cache()
    if left_out:
        print(f"no time left for {', '.join(left_out)}: run again with --only")
    print(f"results appended to {path}; python -m bench.tables.verified makes the table that the package ships")
    return 0 if all(v.correct for v in found) else 1


if __name__ == "__main__":
    sys.exit(main())
