"""Builds csrc/emulate, in which the attention kernels, and the host side of the linear layers, run on the CPU, and calls it."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

CSRC = Path(__file__).parents[2] / "csrc"
ORDERS = ("ascending", "descending", "shuffled")  # in which the threads of a block take turns
# bytes of shared memory by compute capability: of a block, of a multiprocessor
ROOMS = {"8.0": (163 << 10, 164 << 10), "8.6": (99 << 10, 100 << 10), "9.0": (227 << 10, 228 << 10)}
FLAGS = ("-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DSMI_EMULATE", "-shared", "-fPIC")


class Params(ctypes.Structure):
    """AttentionParams of csrc/cuda/attention.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "index", "lengths", "out", "lse", "dout", "dqkv")),
        *((name, ctypes.c_int) for name in ("batch", "rows", "tokens", "heads", "width")),
        ("scale", ctypes.c_float),
        ("wide_index", ctypes.c_bool),
        ("wide_lengths", ctypes.c_bool),
        ("number", ctypes.c_int),
        ("warps", ctypes.c_int),
        ("spans", ctypes.c_int),
    ]


class Counters(ctypes.Structure):
    """emulate::Counters of csrc/emulate/simt.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("matrix_loads", "matrix_conflicts", "stores", "store_conflicts", "products")]


def found() -> bool:
    """Whether g++ is on the PATH."""
    return shutil.which("g++") is not None


def build(folder: Path, sources: Path = CSRC, *flags: str) -> ctypes.CDLL:
    """Compile the emulated kernels of `sources` into `folder` and load them."""
    library = folder / "emulated.so"
    subprocess.run(["g++", *FLAGS, *flags, "-o", library, sources / "emulate" / "attention.cpp"], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.smi_error.restype = ctypes.c_char_p
    loaded.smi_counters.restype = ctypes.POINTER(Counters)
    return loaded


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def is_wide(x: Tensor | None) -> bool:
    return x is not None and x.dtype == torch.int64


class Emulator:
    """The raw functions of kernels/attention/cuda.py, on CPU tensors, by the emulated kernels. `counters` describes the last call."""

    def __init__(self, library: ctypes.CDLL, order: str = "ascending", device: str = "9.0"):
        self.library = library
        self.order = ORDERS.index(order)
        library.smi_room(*ROOMS[device])

    @property
    def counters(self) -> Counters:
        return self.library.smi_counters().contents

    def _call(self, backward: bool, qkv: Tensor, index: Tensor | None, lengths: Tensor | None, scale: float, **tensors: Tensor) -> None:
        batch, rows, _, heads, width = qkv.shape
        tokens = rows if index is None else index.shape[1]
        params = Params(
            qkv=address(qkv), index=address(index), lengths=address(lengths), **{name: address(x) for name, x in tensors.items()},
            batch=batch, rows=rows, tokens=tokens, heads=heads, width=width, scale=scale,
            wide_index=is_wide(index), wide_lengths=is_wide(lengths), number=0 if qkv.dtype == torch.bfloat16 else 1,
        )  # fmt: skip
        if self.library.smi_attention(ctypes.byref(params), int(backward), self.order):
            raise RuntimeError(self.library.smi_error().decode())

    def forward(self, qkv: Tensor, index: Tensor | None, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        batch, rows, _, heads, width = qkv.shape
        tokens = rows if index is None else index.shape[1]
        out = torch.full((batch, tokens, heads * width), float("nan"), dtype=qkv.dtype)
        lse = torch.full((batch, heads, tokens), float("nan"))
        self._call(False, qkv, index, lengths, scale, out=out, lse=lse)
        return out, lse

    def backward(
        self, grad: Tensor, qkv: Tensor, index: Tensor | None, lengths: Tensor | None, out: Tensor, lse: Tensor, scale: float
    ) -> Tensor:  # fmt: skip
        dqkv = torch.full_like(qkv, float("nan")) if index is None and lengths is None else torch.zeros_like(qkv)
        self._call(True, qkv, index, lengths, scale, out=out, lse=lse, dout=grad, dqkv=dqkv)
        return dqkv
