"""What a run gave to the device: kernels of Triton and operations of PyTorch in order, and what of it a real device would have refused."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # in a grid, along x, y and z
WAITS = ("nonzero", "masked_select", "_unique2", "equal")  # operations that wait for the device
ONLY_WRITE = ("copy_", "index_copy_", "fill_", "zero_", "scatter_")  # operations that do not read what they write in place
NO_KERNEL = ("device", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "_unsafe_view")


@dataclass(frozen=True)
class TensorFacts:
    """A tensor that a kernel was given. storage: equal for tensors that share memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    nbytes: int  # of the elements it reaches: an expanded dimension counts once

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorFacts":
        reached = prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
        return cls(tuple(tensor.shape), tensor.dtype, tensor.untyped_storage()._cdata, reached * tensor.element_size())


@dataclass
class Launch:
    """A kernel of Triton. arguments: by name, tensors as TensorFacts; options: num_warps and the like; compiled: what Triton made of it, if asked."""

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    compiled: Any = None

    @property
    def programs(self) -> int:
        return prod(self.grid)


@dataclass
class Operation:
    """An operation of PyTorch that launches a kernel. flops: of its GEMM, 0 where it is none; sizes: (M, N, K) of that."""

    name: str
    bytes: int
    flops: int = 0
    sizes: tuple[int, int, int] | None = None


@dataclass
class Recording:
    """What happened since it was made. steps: one list of kernels for every captured graph. problems: a sentence each."""

    kernels: list[Launch | Operation] = field(default_factory=list)
    steps: list[list[Launch | Operation]] = field(default_factory=list)
    replays: int = 0
    capturing: bool = False
    problems: list[str] = field(default_factory=list)
    before: list[Launch | Operation] = field(default_factory=list)  # kernels before the capture that goes on

    def launch(self, launch: Launch) -> None:
        """Note a kernel of Triton."""
        for name, value in launch.arguments.items():
            if isinstance(value, Tensor) and value.device.type != "cuda":
                self.problems.append(f"{launch.name} was given {name} {tuple(value.shape)} on the {value.device.type}")
        if not all(0 < size <= most for size, most in zip(launch.grid, MOST_PROGRAMS, strict=False)):
            self.problems.append(f"{launch.name} was launched with the grid {launch.grid}")
        launch.arguments = {name: TensorFacts.of(value) if isinstance(value, Tensor) else value for name, value in launch.arguments.items()}
        self.kernels.append(launch)

    def begin(self) -> None:
        """A capture begins."""
        self.capturing, self.before, self.kernels = True, self.kernels, []

    def end(self) -> None:
        """The capture is over: what was launched since it began is a step."""
        self.steps.append(self.kernels)
        self.kernels, self.capturing = [*self.before, *self.kernels], False

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        if self.capturing:
            self.problems.append(f"{what} waits for the device inside a capture")


class Watch(TorchDispatchMode):
    """Notes the operations of PyTorch in a recording. The truth of a fake tensor is that of a healthy run: `all` is true, `any` is false."""

    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.recording.wait(name)
            return getattr(args[0], "result_of", None) == "all" if args[0].dtype == torch.bool else 0
        out = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if name in ("all", "any"):
            out.result_of = name
        devices = {tensor.device.type for tensor in tensors}
        if "cuda" in devices:
            self._note(name, func, devices, args, kwargs, out)
        elif self.recording.capturing and "cpu" in devices:
            self.recording.problems.append(f"{name} runs on the CPU inside a capture, which a replay does not repeat")
        return out

    def _note(self, name: str, func: Any, devices: set[str], args: tuple, kwargs: dict, out: Any) -> None:
        if "cpu" in devices:
            self.recording.wait(f"{name}, from one device to another,")
        elif name in WAITS:
            self.recording.wait(name)
        if name not in NO_KERNEL and not _is_view(func):
            self.recording.kernels.append(operation(name, func, args, kwargs, out))


def operation(name: str, func: Any, args: tuple, kwargs: dict, out: Any) -> Operation:
    """Bytes and FLOPs of an operation of PyTorch: each tensor read or written once, twice where it changes in place."""
    moved = {(x.untyped_storage()._cdata, x.storage_offset()): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
    count = flop_registry.get(func.overloadpacket)
    flops = count(*(x for x in args if isinstance(x, Tensor)), out_val=out) if count else 0
    both = [] if name in ONLY_WRITE else [x for x, about in zip(args, func._schema.arguments, strict=False) if about.alias_info and about.is_write]
    return Operation(name, _bytes(moved.values()) + _bytes(both), flops, _sizes(name, args) if flops else None)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(TensorFacts.of(tensor).nbytes for tensor in tensors)


def _sizes(name: str, args: tuple) -> tuple[int, int, int] | None:
    """(M, N, K) of a GEMM; a batch of them counts as rows."""
    if name not in ("mm", "addmm", "bmm", "baddbmm"):
        return None
    a, b = (args[1], args[2]) if name.endswith("addmm") else (args[0], args[1])
    return prod(a.shape[:-1]), b.shape[-1], a.shape[-1]


def _is_view(func: Any) -> bool:
    """Whether an operation returns a view of its argument and launches nothing."""
    returned = [result.alias_info for result in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
