"""Attention on the CPU against PyTorch's scaled_dot_product_attention: forward and backward from packed qkv to packed gradient.

    python -m bench.cpu_attention                          DeiT-Base at 47 tokens, batch 4: the figure
    python -m bench.cpu_attention --tokens 29 197 577      other sequences
    python -m bench.cpu_attention --threads 1 2

The two sides alternate in one run; each time is a median, with the smallest beside it: on a machine that does other work the ratio of the smallest is
the steadier one. `sdpa in float32` is what a caller gets who converts to float32 around PyTorch's own attention. `ours` is the public operation with
its registration, autograd and fresh memory; `ours, raw` is what the engine calls: the raw functions, into memory that stays.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from smi.kernels import dispatch
from smi.kernels.attention import attention, cpu
from torch import Tensor

from .table import print_table

DTYPES = (torch.bfloat16, torch.float32)


def stock(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def in_float32(qkv: Tensor) -> Tensor:
    return stock(qkv.float()).to(qkv.dtype)


def step(function: Callable, qkv: Tensor, grad: Tensor) -> Callable:
    leaf = qkv.detach().requires_grad_()
    return lambda: torch.autograd.grad(function(leaf), leaf, grad)


def raw_step(qkv: Tensor, grad: Tensor) -> Callable:
    out, dqkv, scale = torch.empty_like(grad), torch.empty_like(qkv), qkv.shape[-1] ** -0.5

    def run() -> None:
        _, lse = cpu.forward(qkv, None, None, scale, out)
        cpu.backward(grad, qkv, None, None, out, lse, scale, dqkv)

    return run


def alternate(sides: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of every side, in turn, after two rounds of each that are not counted."""
    for run in sides.values():
        run(), run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype, threads: int, rounds: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, heads, width).to(dtype)
    grad = torch.randn(batch, tokens, heads * width).to(dtype)
    sides = {"sdpa": step(stock, qkv, grad), "sdpa in float32": step(in_float32, qkv, grad)}
    sides |= {"ours": step(attention, qkv, grad), "ours, raw": raw_step(qkv, grad)}
    seconds = alternate(sides, rounds)
    middle, least = ({name: f(values) * 1e3 for name, values in seconds.items()} for f in (statistics.median, min))
    return {
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        **{f"{name} ms": f"{middle[name]:.2f} ({least[name]:.2f})" for name in sides},
        "ratio": f"{middle['sdpa'] / middle['ours']:.2f}",
        "of smallest": f"{least['sdpa'] / least['ours']:.2f}",
        "raw": f"{middle['sdpa'] / middle['ours, raw']:.2f}",
        "raw, smallest": f"{least['sdpa'] / least['ours, raw']:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[47])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    with dispatch.forced("cpu"), torch.autograd.set_multithreading_enabled(False):
        rows = [
            measure(args.batch, tokens, args.heads, args.width, dtype, threads, args.rounds)
            for tokens in args.tokens
            for dtype in DTYPES
            for threads in args.threads
        ]
    title = f"batch {args.batch}, {args.heads} heads of {args.width}: medians, smallest in brackets; {torch.backends.cpu.get_cpu_capability()}"
    print_table(title, list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
