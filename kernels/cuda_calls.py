"""Calls into the libraries of CUDA C++ (csrc/build.py): whether one can be had here, loaded once, built first where it was not installed.

`linear_*`: what the linear operations share, GEMMs with TMA and fused epilogues for compute capability 9.0 (csrc/cuda/linear*).
"""

import sys
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from smi.csrc import build
from smi.csrc.cache import is_sealed, seal

DTYPES = (torch.bfloat16, torch.float16)  # of all operations in CUDA C++
LINEAR_DEVICE = (9, 0)  # wgmma, TMA and clusters: sm_90a, and no other
FEWEST_ROWS = 64  # a small tile: below, cuBLAS and Triton have smaller ones
PITCH = 8  # numbers: TMA takes rows that begin at multiples of 16 bytes


class Tile(NamedTuple):
    """Of csrc/cuda/linear_gemm.cuh: BM x BN results, and the cycles of a step of BK along the contraction."""

    BM: int
    BN: int
    cycles: int


BK = 64
DIVISIONS = LARGE, SMALL, STREAM_K = range(3)  # Division of csrc/cuda/linear.h
LARGE_TILE = Tile(128, 192, 768)  # cycles of the tensor cores, 2048 multiply-adds each
SMALL_TILE = Tile(64, 128, 422)  # cycles in which 16 KB come from L2, 5120 bytes for 132 multiprocessors in each (docs/gpu-model.md)
FIX_UP = 5000  # cycles to add one part of a tile to the others: 98,304 bytes, read and written, at 40 a cycle (assumed)


def unavailable(library: build.Library, oldest: tuple[int, int], newest: tuple[int, int] | None = None) -> str | None:
    """Why the library cannot run on this machine, in one sentence; None if it can. Compiles nothing.

    oldest, newest: the compute capabilities of its kernels; newest None: there is no upper limit.
    """
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < oldest or (newest and capability > newest):
        wanted = "{}.{}".format(*oldest) + ("" if newest == oldest else " or later")
        return f"it needs compute capability {wanted}, this device has {capability[0]}.{capability[1]}"
    if is_built(library):
        return None
    reason = build.why_not(library)
    return f"the CUDA library was not installed and cannot be built: {reason}" if reason else None


def is_built(library: build.Library) -> bool:
    """Whether the library was installed or is in the cache, for the current device."""
    return build.installed(library).exists() or is_sealed(build.cached_library(architecture(), library))


def ensure_built(library: build.Library) -> str | None:
    """Load the library, compiled first where it was not installed; why it cannot be had, which is also printed."""
    try:
        load(library)
    except (OSError, RuntimeError) as error:
        reason = f"the CUDA library cannot be built here: {str(error)[-500:]}"
        print(f"smi: {reason}; {library.name} runs in another version", file=sys.stderr, flush=True)
        return reason
    return None


def load(library: build.Library):
    """torch.ops.smi_cuda with the operations of the library; built first where it was not installed. Raises RuntimeError where that fails."""
    path = build.installed(library)
    if not path.exists():
        path = build.cached_library(architecture(), library)
        if not is_sealed(path):
            what = f"the CUDA kernels of {library.name} once for compute capability {architecture()}"
            print(f"smi: building {what}, into {path.parent}", file=sys.stderr, flush=True)
            build.compile_library(path, architecture(), library)
            seal(path)
    torch.ops.load_library(str(path))
    return torch.ops.smi_cuda


def architecture() -> str:
    """The architecture to build for on first use, that of the current device."""
    major, minor = torch.cuda.get_device_capability()
    return "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"


def contiguous_aligned(x: Tensor) -> Tensor:
    """x, copied if it is not contiguous or does not start at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@cache
def linear_unavailable() -> str | None:
    """Why this version cannot run on this machine, in one sentence; None if it can. Asked once a process; compiles nothing."""
    return unavailable(build.LINEAR, LINEAR_DEVICE, LINEAR_DEVICE)


def linear_is_built() -> bool:
    """Whether the library was installed or is in the cache, for the current device."""
    return is_built(build.LINEAR)


@cache
def linear_ensure_built() -> str | None:
    """Load the library, compiled first where it was not installed; why it cannot be had, which is also printed. Tried once a process."""
    return ensure_built(build.LINEAR)


@cache
def linear_library():
    """torch.ops.smi_cuda, loaded once; built first where it was not installed. Raises RuntimeError where that fails."""
    return load(build.LINEAR)


def linear_supports(rows: int, weight: tuple[int, ...], dtype: torch.dtype, activation: str = "gelu") -> str | None:
    """Why a GEMM of `rows` rows with a weight of that shape is not covered, in one sentence; None if it is."""
    if dtype not in DTYPES:
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if activation != "gelu":
        return f"it is written for gelu, not for {activation}"
    if any(size % PITCH for size in weight):
        return f"it takes weights whose sizes are multiples of {PITCH}, not {list(weight)}"
    return None if rows >= FEWEST_ROWS else f"it takes {FEWEST_ROWS} rows or more, not {rows}"


def linear_unsupported(x: Tensor, weight: Tensor, activation: str = "gelu") -> str | None:
    """Why rows x [..., k] and a frozen weight cannot be multiplied by this version; None if they can."""
    reason = linear_unavailable()
    if reason:
        return reason
    if torch.cuda.get_device_capability(x.device) != LINEAR_DEVICE:
        return "it needs compute capability 9.0, which the device of these tensors has not"
    return linear_supports(x.numel() // max(x.shape[-1], 1), tuple(weight.shape), x.dtype, activation)


def matrix(x: Tensor) -> Tensor:
    """x [..., k] as rows [M, k] that TMA takes: contiguous, from a multiple of 16 bytes on."""
    return contiguous_aligned(x).reshape(-1, x.shape[-1])


def vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else contiguous_aligned(x)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def division_of(x: Tensor, columns: int, exposed: int = 0, stream_k: bool = False) -> int:
    """One of DIVISIONS for x [M, K] and a weight of so many columns; the rest as in `choose_division`."""
    return choose_division(len(x), columns, x.shape[1], multiprocessors(x.device), exposed, stream_k)


def choose_division(M: int, N: int, K: int, processors: int, exposed: int = 0, stream_k: bool = False) -> int:
    """Of DIVISIONS that in which the fewest cycles go by, by count; the first of equals.

    Whole tiles leave multiprocessors idle in the last wave; small tiles fewer of them, at more bytes a result. With stream-K every multiprocessor
    takes an equal part of all steps. Parts of a tile are added one after the other, in a fixed order, so that results repeat bit for bit: that pays
    for long contractions only. exposed: cycles of an epilogue that nothing hides in a large tile; stream_k: whether that can be chosen.
    """

    def tiles(tile: Tile) -> int:  # in clusters of two tiles of rows
        return 2 * -(-M // (2 * tile.BM)) * -(-N // tile.BN)

    steps, large = -(-K // BK), tiles(LARGE_TILE)
    cycles = {
        LARGE: -(-large // processors) * (steps * LARGE_TILE.cycles + exposed),
        SMALL: -(-tiles(SMALL_TILE) // processors) * steps * SMALL_TILE.cycles,
    }
    if stream_k:
        others = -(-processors // large)  # that add to the same tile
        cycles[STREAM_K] = -(-large * steps // processors) * LARGE_TILE.cycles + others * FIX_UP
    return min(cycles, key=cycles.__getitem__)
