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
from dataclasses import replace

import torch

from .cases import operations as operation_cases
from .cases import suites
from .measuring import inversions, operations, record
from .sides.fast_dtype import fast_dtype
from .tables.terminal import print_table

SECONDS = {False: 840.0, True: 105.0}  # of 15 and of 2 minutes
ORDER = ("memory", "steps", "whole", "scaling", "operations")
LEAST_SECONDS = {"memory": 5.0, "steps": 2.0, "whole": 5.0, "scaling": 2.0, "operations": 5.0}  # below which a case is not begun
OPERATIONS_BATCH = 4  # images, on the CPU


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=ORDER, default=list(ORDER), help="these suites")
    parser.add_argument("--quick", action="store_true", help="the key figures only")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--seconds", type=float, help="end after about so many")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--no-write", action="store_true", help="print, and append nothing")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = suites.quick_on_cpu() if options.quick else suites.on_cpu() if options.device.type == "cpu" else suites.on_gpu()
    budget = operations.Budget(options.seconds or SECONDS[options.quick])
    about = record.environment(options.device)
    path = None if options.no_write else record.results_file(about["device"])
    left_out = measure_suites(chosen, options.suite, options.device, budget, about, path, options.only)
    if left_out:
        print(f"no time left for {len(left_out)} cases: {'; '.join(left_out)}. Run again with --suite, --only or --seconds")
    print(f"rows appended to {path}; python -m bench.paper makes the tables" if path else "nothing written")
    return 0


def measure_suites(
    chosen: suites.Suites, names: Iterable[str], device, budget: operations.Budget, about: dict, path, only: str | None = None
) -> list[str]:
    """Measure the named suites, each within its share of the time that is left; rows are written and shown as they come. Names of cases left out."""
    rates = inversions.product_rates(device)
    print(", ".join(f"{name}: product {rate.operations / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    about = about | {"product_gigaflops": {name: rate.operations / 1e9 for name, rate in rates.items()}}
    about |= {"copy_gigabytes_per_second": rates["float32"].bytes / 1e9}
    measures: dict[str, Callable[[object, float], list[dict]]] = {
        "memory": lambda case, seconds: inversions.measure_memory(case, device),
        "steps": lambda case, seconds: inversions.measure_step(case, device, seconds, rates),
        "scaling": lambda case, seconds: inversions.measure_step(case, device, seconds, rates),
        "whole": lambda case, seconds: inversions.measure_whole(case, device, seconds, rates),
    }
    left_out = []
    for suite in (name for name in ORDER if name in set(names)):
        end = operations.Budget(suites.Suites.shares[suite] * budget.left())
        if suite == "operations":
            left_out += measure_operations(device, end, about, path, only) if chosen.operations else []
            continue
        cases = [case for case in getattr(chosen, suite) if only is None or only in case.name]
        for place, case in enumerate(cases):
            if end.left() < LEAST_SECONDS[suite]:
                left_out += [f"{suite}: {name}" for name in suites.names(cases[place:])]
                break
            rows = measures[suite](case, end.left() / max(2, len(cases) - place))
            write(path, about | {"suite": suite}, rows)
            SHOW[rows[0]["kind"]](case.name, rows)
    return left_out


def measure_operations(device: torch.device, budget: operations.Budget, about: dict, path, only: str | None) -> list[str]:
    """The operations on the CPU, in the dtype that is fast there, at a smaller batch than `bench.gpu` has on a GPU; names of cases left out."""
    from .gpu import case_rows, show_case

    if device.type != "cpu":
        return []
    operation_cases.BATCH = OPERATIONS_BATCH
    found = [operation_cases.attention_case(tokens, OPERATIONS_BATCH) for tokens in (47, 197)]
    found += [make(n) for n in (47, 197) for make in (operation_cases.cls_case, operation_cases.norm_case)]
    found += [make(n) for n in (47, 197) for make in (operation_cases.gelu_case, operation_cases.residual_case)]
    found += [make(n) for n in (46, 196) for make in (operation_cases.embed_case, operation_cases.step_case)] + [operation_cases.tv_case()]
    left_out, dtype = [], fast_dtype(device)
    ceiling = operations.ceilings(device, dtype=dtype, **inversions.CPU_CEILING)
    for case in found:
        name = f"{case.operation} {case.name}"
        if (only is not None and only not in name) or budget.left() < LEAST_SECONDS["operations"]:
            left_out += [f"operations: {name}"] if only is None else []
            continue
        if case.dtype == torch.bfloat16 and dtype == torch.float32:
            case = replace(case, dtype=dtype, bytes=2 * case.bytes)
        measured, refused = operations.measure(case, device, ceiling, rounds=10)
        resolved = operations.versions(case.operation, device)[-1]
        write(path, about | {"suite": "operations"}, case_rows(case, measured, refused, resolved))
        show_case(case, measured, refused, resolved)
    return left_out


def write(path, about: dict, rows: list[dict]) -> None:
    if path is not None:
        record.append(path, [about | row for row in rows])


def spread(values: list[float], digits: int = 2) -> str:
    """Median with the 20 and 80 % quantiles."""
    return f"{values[1]:.{digits}f} ({values[0]:.{digits}f}-{values[2]:.{digits}f})"


def show_steps(name: str, rows: list[dict]) -> None:
    cells = [
        [row["side"], row["resolved"], spread(row["ms"], 1), f"{row['teraflops'] * 1e3:.0f}",
         f"{row['share_of_products']:.0%}" if row["share_of_products"] else "",
         *(spread(row[f"over_{other}"]) if f"over_{other}" in row else "" for other in ("eager", "compiled"))]
        for row in rows if "ms" in row
    ]  # fmt: skip
    columns = ["side", "runs in", "ms 50 (20-80 %)", "GFLOP/s", "of products", "x eager", "x compiled"]
    print_table(f"step: {name}, {rows[0]['rounds']} rounds", columns, cells)
    show_refused(rows, "not_timed")


def show_whole(name: str, rows: list[dict]) -> None:
    cells = [
        [row["side"], row["resolved"], spread(row["images_per_second"], 4), f"{row['iterations_per_second']:.2f}", f"{row['seconds'][1]:.1f}",
         f"{row['share_of_products']:.0%}" if row["share_of_products"] else ""]
        for row in rows
    ]  # fmt: skip
    how = f"extrapolated from {' and '.join(map(str, rows[0]['timed_iterations']))} iterations" if rows[0]["extrapolated"] else "in earnest"
    title = f"whole run: {name}, {rows[0]['images']} images, {rows[0]['iterations']} iterations, {how}"
    print_table(title, ["side", "runs in", "images/s", "it/s", "seconds", "of products"], cells)


def show_memory(name: str, rows: list[dict]) -> None:
    cells = [
        [row["side"], row["resolved"], *(f"{row[key] / 2**20:.0f}" for key in ("kept_bytes", "peak_above_idle_bytes", "idle_bytes"))]
        for row in rows if "kept_bytes" in row
    ]  # fmt: skip
    print_table(f"memory: {name}, MiB", ["side", "runs in", "kept for backward", "peak above idle", "idle"], cells)
    show_refused(rows, "not_measured")


def show_refused(rows: list[dict], key: str) -> None:
    for row in rows:
        if key in row:
            print(f"  {row['side']}: {key.replace('_', ' ')}, {row[key]}")


SHOW = {"step": show_steps, "whole": show_whole, "memory": show_memory}

if __name__ == "__main__":
    sys.exit(main())
