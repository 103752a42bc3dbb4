"""Attention on the CPU against PyTorch's scaled_dot_product_attention: forward and backward from packed qkv to packed gradient.

    python -m bench.experiments.cpu_attention                          DeiT-Base at 47 tokens, batch 4: the figure
    python -m bench.experiments.cpu_attention --tokens 29 197 577      other sequences
    python -m bench.experiments.cpu_attention --threads 1 2 --no-append

The sides take turns in one run, some calls a turn after WARM that are not counted: what follows ten milliseconds of others finds every cache cold.
Each time is a median over turns, with the smallest beside it: on a machine that does other work the ratio of the smallest is the steadier one. `sdpa
in float32` is what a caller gets who converts to float32 around PyTorch's own attention. `ours` is the public operation, with autograd and fresh
memory; `kernels` what it calls in C++, alone and into memory that stays; `engine` what the engine calls, which saves less and recomputes P.
Rows are appended to bench/results/<device>.jsonl, one for every side.
"""

import argparse
import ctypes
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from smi.console import print_table
from smi.csrc import host
from smi.kernels import versions
from smi.kernels.attention import attention, cpu
from smi.kernels.cpp_calls import WHOLE_BATCH
from smi.kernels.timing import quantiles

from ..tables.experiments import CPU_ATTENTION
from ..tables.rows import measurements
from .result_rows import append_to_results, with_environment

DTYPES = (torch.bfloat16, torch.float32)
WARM = 3


def stock(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def in_float32(qkv: Tensor) -> Tensor:
    return stock(qkv.float()).to(qkv.dtype)


def step(function: Callable, qkv: Tensor, grad: Tensor) -> Callable:
    leaf = qkv.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(leaf), leaf, grad)


def kernels_step(qkv: Tensor, grad: Tensor) -> Callable:
    batch, n, _, heads, width = qkv.shape
    params = cpu.Params(stride=qkv.stride()[:4], batch=batch, rows=n, n=n, heads=heads, width=width, scale=width**-0.5)
    shares = host.library().smi_attention_shares(ctypes.byref(params))
    kept = {"shares": qkv.new_empty(shares)} if shares else {"lse": torch.empty(batch, heads, n)}
    tensors = {"qkv": qkv, "out": torch.empty_like(grad), "grad": grad, "dqkv": torch.empty_like(qkv), **kept}
    for name, tensor in tensors.items():
        setattr(params, name, tensor.data_ptr())
    functions = [getattr(host.library(), f"smi_attention_{function}_{cpu.DTYPES[qkv.dtype]}") for function in ("forward", "backward")]

    def run() -> None:
        for function in functions:
            function(ctypes.byref(params), WHOLE_BATCH)

    run.tensors = tensors  # whose addresses are in params
    return run


def engine_step(qkv: Tensor, grad: Tensor) -> Callable:
    out, dqkv, scale = torch.empty_like(grad), torch.empty_like(qkv), qkv.shape[-1] ** -0.5

    def run() -> None:
        _, lse = cpu.forward(qkv, None, None, scale, out)
        cpu.backward(grad, qkv, None, None, out, lse, scale, dqkv)

    return run


def alternate(sides: dict[str, Callable], rounds: int, calls: int = 1, warm: int = 0) -> dict[str, list[float]]:
    """Seconds a call in every turn of every side, `calls` calls a turn after `warm` that are not counted, nor are two of each side before all."""
    for run in sides.values():
        run(), run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            for _ in range(warm):
                run()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def measure(tokens: int, dtype: torch.dtype, threads: int, given: argparse.Namespace) -> list[dict]:
    """A row for every side: 20, 50 and 80 % quantiles over turns, the smallest, and both over sdpa's."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    qkv = torch.randn(given.batch, tokens, 3, given.heads, given.width).to(dtype)
    grad = torch.randn(given.batch, tokens, given.heads * given.width).to(dtype)
    sides = {"sdpa": step(stock, qkv, grad), "sdpa in float32": step(in_float32, qkv, grad)}
    sides |= {"ours": step(attention, qkv, grad), "kernels": kernels_step(qkv, grad), "engine": engine_step(qkv, grad)}
    milliseconds = {side: [s * 1e3 for s in seconds] for side, seconds in alternate(sides, given.rounds, given.calls, WARM).items()}
    about = {"tokens": tokens, "width": given.width, "heads": given.heads, "batch": given.batch, "dtype": str(dtype).removeprefix("torch.")}
    about |= {"threads": threads, "rounds": given.rounds, "calls": given.calls}
    stock_median, stock_least = statistics.median(milliseconds["sdpa"]), min(milliseconds["sdpa"])
    return [
        about
        | {"side": side, "ms": list(quantiles(turns)), "least_ms": min(turns)}
        | {"over_sdpa": stock_median / statistics.median(turns), "least_over_sdpa": stock_least / min(turns)}
        for side, turns in milliseconds.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[47])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20, help="turns of each side")
    parser.add_argument("--calls", type=int, default=30, help="calls a turn")
    parser.add_argument("--no-append", action="store_true", help="leave bench/results as it is")
    given = parser.parse_args(arguments)
    cases = itertools.product(given.tokens, DTYPES, given.threads)
    with versions.forced("cpu"), torch.autograd.set_multithreading_enabled(False):
        rows = with_environment("cpu_attention", [row for case in cases for row in measure(*case, given)])
    if not given.no_append:
        append_to_results(rows)
    title = f"{torch.backends.cpu.get_cpu_capability()}; medians of {given.rounds} turns of {given.calls} calls, smallest in brackets"
    print_table(title, CPU_ATTENTION.columns, [line for case in measurements(rows) for line in CPU_ATTENTION.lines(case)])


if __name__ == "__main__":
    main()
