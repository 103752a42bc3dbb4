"""Builds csrc/emulate/linear.cpp and calls it: the operations of the library "linear" on CPU tensors, by what CUTLASS's host code makes of them.

The tensor maps that would be encoded say which numbers are multiplied and where results lie; the epilogue is the kernels' visitor tree.
"""

import ctypes
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from smi.csrc import build

KINDS = ("gelu", "residual", "gelu_gradient")  # Linear of csrc/cuda/linear.h
MULTIPROCESSORS = 132
TWO_BYTES = (1, 9)  # CU_TENSOR_MAP_DATA_TYPE_UINT16 and _BFLOAT16: the same to TMA, which fills with zeros past the ends
SWIZZLE_BYTES = (1 << 30, 32, 64, 128)  # by CUtensorMapSwizzle: the most that the innermost side of a box may have


class Params(ctypes.Structure):
    """LinearParams of csrc/cuda/linear.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "gamma", "other", "out", "saved", "workspace")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "depth", "multiprocessors")),
        ("division", ctypes.c_int),
    ]


class Map(ctypes.Structure):
    """A tensor map: a tensor in global memory, innermost dimension first. sizes in numbers, pitches in bytes."""

    _fields_ = [
        ("address", ctypes.c_void_p),
        ("sizes", ctypes.c_uint64 * 5),
        ("pitches", ctypes.c_uint64 * 5),
        ("box", ctypes.c_uint32 * 5),
        *((name, ctypes.c_uint32) for name in ("rank", "swizzle", "type")),
    ]


class Launch(ctypes.Structure):
    """What would be launched. shared, workspace: bytes."""

    _fields_ = [
        ("possible", ctypes.c_bool),
        ("workspace", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("shared", "stages", "threads", "count")),
        ("map", Map * 8),
    ]

    @property
    def maps(self) -> dict[int, Map]:
        """By address."""
        return {one.address: one for one in self.map[: self.count]}


def compile_emulation(folder: Path) -> ctypes.CDLL:
    """Compile with nvcc, for an architecture whose kernels would be empty: none is instantiated."""
    library = folder / "linear.so"
    options = ["-O0", "-arch=sm_80", "-shared", "-Xcompiler", "-fPIC", "-Xlinker", "-Bsymbolic,--allow-multiple-definition", "-x", "cu"]
    standard = next(flag for flag in build.FLAGS if flag.startswith("-std"))
    command = [build.nvcc(), standard, *options, *build.CUTLASS_FLAGS, "-isystem", build.cutlass(), "-o", library]
    subprocess.run([*command, build.FOLDER.parent / "emulate" / "linear.cpp"], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.smi_linear_launch.restype = ctypes.POINTER(Launch)
    return loaded


class EmulatedLinear:
    """The operations of torch.ops.smi_cuda that bindings.cpp registers for the library "linear". `launch` describes the last call."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.launch = None

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, saved: Tensor | None, division: int) -> None:
        self._call("gelu", x, weight, len(weight), division, bias=bias, out=out, saved=saved)

    def linear_residual(self, x, weight, bias, gamma, residual, out, division: int) -> None:
        self._call("residual", x, weight, len(weight), division, bias=bias, gamma=gamma, other=residual, out=out)

    def linear_gelu_gradient(self, grad: Tensor, weight: Tensor, saved: Tensor, out: Tensor, division: int) -> None:
        self._call("gelu_gradient", grad, weight, weight.shape[1], division, other=saved, out=out)

    def describe(self, kind: str, rows: int, columns: int, depth: int, division: int, **addresses: int) -> tuple[Params, Launch]:
        params = Params(rows=rows, columns=columns, depth=depth, multiprocessors=MULTIPROCESSORS, division=division, **addresses)
        return params, self.library.smi_linear_launch(KINDS.index(kind), ctypes.byref(params)).contents

    def _call(self, kind: str, x: Tensor, weight: Tensor, columns: int, division: int, **tensors: Tensor | None) -> None:
        tensors = {name: t for name, t in (tensors | {"x": x, "weight": weight}).items() if t is not None}
        assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 and t.dtype == torch.bfloat16 for t in tensors.values())
        addresses = {name: t.data_ptr() for name, t in tensors.items()}
        params, self.launch = self.describe(kind, len(x), columns, x.shape[1], division, **addresses)
        assert self.launch.possible
        maps = self.launch.maps
        left = mapped(x, maps[addresses["x"]])  # [depth, rows] or [rows, depth], as the map says
        right = mapped(weight, maps[addresses["weight"]])
        # operands are what the mainloop reads by these maps: x with the contraction innermost, the weight as its kind has it
        acc = left.float() @ (right.float().T if kind != "gelu_gradient" else right.float())
        assert mapped(tensors["out"], maps[addresses["out"]]).shape == acc.shape
        for name in ("other", "saved"):
            assert name not in tensors or mapped(tensors[name], maps[addresses[name]]).shape == acc.shape
        self.library.smi_linear_epilogue(KINDS.index(kind), ctypes.byref(params), ctypes.c_void_p(acc.contiguous().data_ptr()))


def mapped(x: Tensor, tensor_map: Map) -> Tensor:
    """The matrix that a tensor map over x's memory describes, outer dimension first."""
    assert tensor_map.address == x.data_ptr()
    assert list(tensor_map.sizes[2 : tensor_map.rank]) == [1] * (tensor_map.rank - 2)
    return x.as_strided((tensor_map.sizes[1], tensor_map.sizes[0]), (tensor_map.pitches[1] // 2, 1))
