"""Rows of one case as a table on the terminal, as soon as they are measured."""

from smi.console import print_table
from smi.kernels.verdicts import Verdict


def show(rows: list[dict]) -> None:
    """The sides of one case, of any kind, then those that were not measured, with the reason."""
    SHOW[rows[0]["kind"]](rows)
    for row in rows:
        for key in ("not_timed", "not_measured"):
            if key in row:
                print(f"  {row['side']}: {key.replace('_', ' ')}, {row[key]}")


def show_step(rows: list[dict]) -> None:
    cells = [
        [row["side"], row["resolved"], spread(row["ms"], 1), f"{row['teraflops'] * 1e3:.0f}", percent(row["share_of_products"]),
         *(spread(row[f"over_{other}"]) if f"over_{other}" in row else "" for other in ("eager", "compiled"))]
        for row in rows if "ms" in row
    ]  # fmt: skip
    columns = ["side", "runs in", "ms 50 (20-80 %)", "GFLOP/s", "of GEMM peak", "x eager", "x compiled"]
    print_table(f"step: {rows[0]['case']}, {rows[0]['rounds']} rounds", columns, cells)


def show_whole(rows: list[dict]) -> None:
    cells = [
        [row["side"], row["resolved"], spread(row["images_per_second"], 4), f"{row['iterations_per_second']:.2f}", f"{row['seconds'][1]:.1f}",
         percent(row["share_of_products"])]
        for row in rows if "seconds" in row
    ]  # fmt: skip
    how = f"extrapolated from {' and '.join(map(str, rows[0]['timed_iterations']))} iterations" if rows[0]["extrapolated"] else "measured in full"
    title = f"whole run: {rows[0]['case']}, {rows[0]['images']} images, {rows[0]['iterations']} iterations, {how}"
    print_table(title, ["side", "runs in", "images/s", "it/s", "seconds", "of GEMM peak"], cells)


def show_memory(rows: list[dict]) -> None:
    cells = [
        [row["side"], row["resolved"], *(f"{row[key] / 2**20:.0f}" for key in ("kept_bytes", "peak_above_idle_bytes", "idle_bytes"))]
        for row in rows if "kept_bytes" in row
    ]  # fmt: skip
    print_table(f"memory: {rows[0]['case']}, MiB", ["side", "runs in", "saved activations", "peak above idle", "idle"], cells)


def show_operation(rows: list[dict]) -> None:
    timed = [row for row in rows if "warm_us" in row]
    cells = [
        [row["side"], f"{row['warm_us'][1]:.1f}", " ".join(f"{us:.1f}" for us in row["cold_us"] or ()), f"{row['gigabytes_per_second']:.3g}",
         f"{row['teraflops']:.3g}", percent(row["share_of_floor"]), f"{row['peak_bytes'] / 2**20:.0f}"]
        for row in timed
    ]  # fmt: skip
    how = " in a CUDA graph" if any(row["cold_us"] for row in timed) else ""
    title = "{operation}, {case}, {dtype}, forward and backward{how} (auto takes {resolved})".format(**rows[0], how=how)
    print_table(title, ["side", "warm us", "cold us 20 50 80 %", "GB/s", "TFLOP/s", "of roofline", "MiB"], cells)


SHOW = {"step": show_step, "whole": show_whole, "memory": show_memory, "case": show_operation}  # by the kind of row


def show_verdicts(found: list[Verdict]) -> None:
    rows = [[str(v.key), v.outcome, f"{v.speedup:.2f}x" if v.correct else "", v.note[:90]] for v in found]
    print_table("versions against float64, and against stock PyTorch", ["what is called", "outcome", "speed", "note"], rows)


def spread(values: list[float], digits: int = 2) -> str:
    """Median with the 20 and 80 % quantiles."""
    return f"{values[1]:.{digits}f} ({values[0]:.{digits}f}-{values[2]:.{digits}f})"


def percent(share: float | None) -> str:
    return f"{share:.0%}" if share else ""
