"""Tiles of the attention kernels: which sizes a kernel is compiled for, by head width, bytes of a number, tokens, and what limits a GPU: the
instructions that multiply, and the shared memory of a block.

Chosen from the compiler's report (registers, spills, shared memory, instructions; see README.md), not timed. A head is padded to a power of two.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import tuned
from ..compile_case import SMALL, SMALLEST, CompileCase

WIDEST = 128  # elements of a head
OLDEST = 80  # code
LARGEST = 227  # KiB that a block gets on sm_90 and 100


class Tile(NamedTuple):
    """BT queries and BS keys at a time, in the single-pass backward the last tile of keys BE; warps of a program, stages of its loop."""

    BT: int
    BS: int
    BE: int
    warps: int
    stages: int


class Entry(NamedTuple):
    """A tile, the longest sequence it is for, and the least it needs: code of `tuned.Limits`, KiB of a block. The first that fits is taken."""

    n: int  # tokens
    tile: Tile
    oldest: int = OLDEST
    shared: int = SMALLEST


ANY = 1 << 30  # tokens
ARCHITECTURES = (80, 90, 100)  # compiled for
WIDTHS = (16, 32, 64, 128)  # padded

# Forward, by padded width and bytes. One tile of keys up to 64 tokens, so the loop vanishes; beyond, two stages bring the next keys in meanwhile.
# Two stages on sm_90 need the fences of ../hopper.py; one stage, the other way out, gives up the overlap.
SHORT_FORWARD = (Entry(16, Tile(16, 16, 0, 1, 1)), Entry(32, Tile(32, 32, 0, 2, 1)), Entry(64, Tile(64, 64, 0, 4, 1)))
FORWARD = {
    (16, 2): (*SHORT_FORWARD, Entry(ANY, Tile(64, 64, 0, 4, 2))),
    (32, 2): (*SHORT_FORWARD, Entry(ANY, Tile(64, 64, 0, 4, 2))),
    (64, 2): (*SHORT_FORWARD, Entry(ANY, Tile(64, 64, 0, 4, 2))),
    (128, 2): (*SHORT_FORWARD[:2], Entry(64, Tile(64, 64, 0, 8, 1)), Entry(ANY, Tile(64, 64, 0, 8, 2))),
} | {(width, 4): (Entry(16, Tile(16, 16, 0, 2, 1)), Entry(ANY, Tile(32, 32, 0, 4, 1))) for width in (16, 32, 64)}
FORWARD |= {(128, 4): (Entry(16, Tile(16, 16, 0, 4, 1)), Entry(ANY, Tile(32, 16, 0, 8, 1)))}

# Backward in one pass: all keys, values and their gradients of a head on the chip. Longer sequences than the last entry take the pair of kernels.
BACKWARD = {
    (16, 2): (
        Entry(16, Tile(16, 16, 16, 1, 1)),
        Entry(32, Tile(32, 32, 32, 2, 1)),
        Entry(64, Tile(64, 64, 64, 4, 1)),
        Entry(128, Tile(32, 128, 128, 8, 2)),
        Entry(256, Tile(32, 256, 256, 8, 2)),
    ),
    (32, 2): (
        Entry(16, Tile(16, 16, 16, 2, 1)),
        Entry(32, Tile(32, 32, 32, 4, 1)),
        Entry(64, Tile(64, 64, 64, 4, 1)),
        Entry(128, Tile(32, 128, 128, 8, 2)),
        Entry(192, Tile(32, 128, 64, 8, 2)),
        Entry(256, Tile(32, 256, 256, 8, 2)),
    ),
    (64, 2): (
        Entry(16, Tile(16, 16, 16, 2, 1)),
        Entry(32, Tile(32, 32, 32, 4, 1)),
        Entry(64, Tile(64, 64, 64, 4, 1)),
        Entry(128, Tile(32, 128, 128, 8, 2), 90),
        Entry(128, Tile(16, 128, 128, 8, 2)),
        Entry(192, Tile(32, 128, 64, 8, 2), 90),
        Entry(160, Tile(32, 128, 32, 8, 1)),
        Entry(256, Tile(32, 256, 256, 8, 2), 90, LARGEST),
    ),
    (128, 2): (
        Entry(16, Tile(16, 16, 16, 4, 1)),
        Entry(32, Tile(32, 32, 32, 4, 1)),
        Entry(64, Tile(64, 64, 64, 8, 1)),
        Entry(128, Tile(32, 128, 128, 8, 1), 90, LARGEST),
    ),
    (16, 4): (Entry(16, Tile(16, 16, 16, 2, 1)), Entry(32, Tile(32, 32, 32, 4, 1))),
    (32, 4): (Entry(16, Tile(16, 16, 16, 2, 1)), Entry(32, Tile(32, 32, 32, 4, 1))),
    (64, 4): (Entry(16, Tile(16, 16, 16, 4, 1)), Entry(32, Tile(32, 32, 32, 8, 1))),
    (128, 4): (Entry(16, Tile(16, 16, 16, 8, 1)),),
}

# The pair for longer sequences: dq and delta by queries, dk and dv by keys.
QUERIES = {(width, 2): Tile(64, 64, 0, 4, 2) for width in WIDTHS} | {(128, 2): Tile(64, 64, 0, 8, 2)}
QUERIES |= {(width, 4): Tile(32, 32, 0, 8, 1) for width in (16, 32, 64)} | {(128, 4): Tile(16, 16, 0, 8, 1)}
QUERIES_SMALL = QUERIES | {(128, 2): Tile(64, 64, 0, 8, 1)}  # where a block gets SMALLEST: there ptxas spills with two stages
KEYS = {(width, 2): Tile(64, 64, 0, 4, 2) for width in (16, 32)} | {(64, 2): Tile(32, 64, 0, 4, 2), (128, 2): Tile(32, 64, 0, 8, 2)}
KEYS |= {(width, 4): Tile(32, 32, 0, 8, 1) for width in WIDTHS}


def padded_width(width: int) -> int:
    return next(w for w in WIDTHS if width <= w)


def _key(width: int, dtype: torch.dtype) -> tuple[int, int]:
    return padded_width(width), dtype.itemsize


def first(entries: tuple[Entry, ...], n: int, code: int, shared: int = LARGEST) -> Entry | None:
    """The entry for n tokens where tl.dot is compiled to `code` and a block gets the given KiB of shared memory; None if there is none."""
    return next((entry for entry in entries if n <= entry.n and entry.oldest <= code and entry.shared <= shared), None)


def _tuned(kernel: str, width: int, x: torch.Tensor, built_in: Tile) -> Tile:
    return tuned.tile("attention", f"{kernel}/d{padded_width(width)}/{x.itemsize}", built_in, x.device)


def forward(n: int, width: int, x: torch.Tensor) -> Tile:
    """For n tokens of heads of this width of numbers like x."""
    entry = first(FORWARD[_key(width, x.dtype)], n, OLDEST)
    most = entry.n if entry.n < ANY else 1 << (n - 1).bit_length()  # longer ones by powers of two
    return _tuned(f"fwd-n{most}", width, x, entry.tile)


def backward(n: int, width: int, x: torch.Tensor) -> Tile | None:
    """The tile of the single pass; None where n tokens take the pair."""
    gpu = tuned.limits(x.device)
    entry = first(BACKWARD[_key(width, x.dtype)], n, gpu.code, gpu.shared // 1024)
    return _tuned(f"bwd-n{entry.n}", width, x, entry.tile) if entry else None


def queries(width: int, x: torch.Tensor) -> Tile:
    table = QUERIES_SMALL if tuned.limits(x.device).shared <= SMALLEST * 1024 else QUERIES
    return _tuned("bwd-queries", width, x, table[_key(width, x.dtype)])


def keys(width: int, x: torch.Tensor) -> Tile:
    return _tuned("bwd-keys", width, x, KEYS[_key(width, x.dtype)])


def _case(
    name: str, kernel: Callable, number: str, width: int, tile: Tile, gathered: bool, constants: dict, on: tuple | None = None, shared: int = SMALLEST
) -> CompileCase:
    tensors = {f"p_{x}": f"*{number}" for x in ("qkv", "out", "grad", "dqkv")} | {"p_lse": "*fp32", "p_delta": "*fp32"}
    integers = dict.fromkeys(("H", "n", "L", "s_b", "s_t", "s_c", "s_h"), "i32")
    types = tensors | integers | {"scale": "fp32"}
    if gathered:
        types |= {"p_index": "*i32", "p_lengths": "*i32"}
    else:
        constants = constants | {"p_index": None, "p_lengths": None}
    constants = constants | {"D": width, "BD": padded_width(width), "BT": tile.BT, "BS": tile.BS, "USE_INDEX": gathered, "USE_LENGTHS": gathered}
    arguments = kernel.arg_names
    return CompileCase(
        f"attention/{name}/{number}-d{width}" + ("-gathered" if gathered else ""),
        kernel,
        {k: v for k, v in types.items() if k in arguments},
        {k: v for k, v in constants.items() if k in arguments},
        tile.warps,
        tile.stages,
        ("s_b", "s_t", "s_c", "s_h"),
        on,
        shared,
    )


def compile_cases(kernels: dict[str, Callable]) -> list[CompileCase]:
    """Cases of kernels "forward", "backward", "queries", "keys" in every tile: bf16 plain and gathered; float32 and a padded head, 80 of 128, in
    bf16, gathered alone, which needs the most registers."""
    cases = []
    for width, number in [(w, number) for number in ("bf16", "fp32") for w in WIDTHS] + [(80, "bf16")]:
        key = padded_width(width), 2 if number == "bf16" else 4
        for gathered in (False, True) if number == "bf16" and width in WIDTHS else (True,):
            for entry in FORWARD[key]:
                constants = {"ONE_TILE": entry.n <= entry.tile.BS}
                name = f"fwd-n{entry.n if entry.n < ANY else 'any'}"
                cases.append(_case(name, kernels["forward"], number, width, entry.tile, gathered, constants))
            for entry in BACKWARD[key]:
                tile = entry.tile
                constants = {"BE": tile.BE, "NS": -(-entry.n // tile.BS), "ONE_TILE": entry.n <= tile.BT}
                on = tuple(a for a in ARCHITECTURES if first(BACKWARD[key], entry.n, a) is entry)
                name = f"bwd-n{entry.n}" + (f"-sm{on[0]}" if on != ARCHITECTURES else "")
                cases.append(_case(name, kernels["backward"], number, width, tile, gathered, constants, on, entry.shared))
            other = QUERIES_SMALL[key] != QUERIES[key]
            cases.append(_case("bwd-queries", kernels["queries"], number, width, QUERIES[key], gathered, {}, shared=SMALLEST + other))
            if other:
                cases.append(_case("bwd-queries-small", kernels["queries"], number, width, QUERIES_SMALL[key], gathered, {}, SMALL))
            cases.append(_case("bwd-keys", kernels["keys"], number, width, KEYS[key], gathered, {}))
    return cases
