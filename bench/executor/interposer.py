"""Triton launches on CPU tensors, each compiled for an architecture, and its PTX executed."""

import inspect
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from smi.kernels.compile_case import CompileCase

from .compiling import Compiled, build, build_case
from .ptx.launch import execute
from .ptx.memory import Memory

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64", torch.int8: "*i8",
    torch.uint8: "*u8", torch.bool: "*i1", torch.float64: "*fp64",
}  # fmt: skip
DEFAULT_WARPS = 4  # of a launch that names none
ALIGNED = 16  # bytes, and the factor of integers that Triton specialises for


@dataclass
class Record:
    """What ran: launches by compile case, or by kernel where there was none; blocks, instructions, seconds of execution; races and missing fences."""

    launches: Counter = field(default_factory=Counter)
    blocks: int = 0
    instructions: int = 0
    seconds: float = 0.0
    reports: list[str] = field(default_factory=list)


@dataclass
class Launch:
    """One launch: arguments and options (num_warps, ...) by name."""

    kernel: object
    arguments: dict
    options: dict

    def is_of(self, case: CompileCase) -> bool:
        """Whether the launch takes the case's configuration: same kernel, constants, types, warps and stages."""
        warps, stages = self.options.get("num_warps", DEFAULT_WARPS), self.options.get("num_stages", case.num_stages)
        if case.kernel is not self.kernel or (case.num_warps, case.num_stages) != (warps, stages):
            return False
        return all(self._fits(case, name, value) for name, value in self.arguments.items())

    def _fits(self, case: CompileCase, name: str, value) -> bool:
        if name in case.constants or value is None:
            return name in case.constants and case.constants[name] == value
        kind = case.types[name]
        return POINTERS[value.dtype] == kind if isinstance(value, Tensor) else not kind.startswith("*")

    def is_aligned_as(self, case: CompileCase) -> bool:
        """Whether multiples of 16 are where the case's program counts on them."""
        pointers = [value.data_ptr() for value in self.arguments.values() if isinstance(value, Tensor)]
        return all(number % ALIGNED == 0 for number in [*pointers, *(self.arguments[name] for name in case.aligned)])


def specialised(value, constant: bool) -> tuple[str | None, bool]:
    """(type, whether a multiple of 16) of an argument; type None for what becomes a constant: constexpr, None, and the integer 1."""
    if constant or value is None or (type(value) is int and value == 1):
        return None, False
    if isinstance(value, Tensor):
        return POINTERS[value.dtype], value.data_ptr() % ALIGNED == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % ALIGNED == 0
    return "fp32", False


def storage(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's whole storage, shared with it."""
    raw = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(raw, 0, (raw.nbytes(),)).numpy()


class Executor:
    """Runs launches for one architecture. cases: programs to take where one fits; other launches are specialised as Triton's launcher would."""

    def __init__(self, architecture: int, cases: list[CompileCase]):
        self.architecture, self.cases, self.record = architecture, cases, Record()
        self.built: dict[object, Compiled] = {}

    def program_of(self, launch: Launch) -> tuple[str, list[str], Compiled]:
        """Its name, the arguments that it takes at run time, and the program."""
        case = next((case for case in self.cases if launch.is_of(case)), None)
        if case is None or not launch.is_aligned_as(case):
            return (case.name if case else launch.kernel.fn.__name__), *self._specialised(launch)
        if case.name not in self.built:
            self.built[case.name] = build_case(case, self.architecture)
        return case.name, [name for name in case.kernel.arg_names if name in case.types], self.built[case.name]

    def _specialised(self, launch: Launch) -> tuple[list[str], Compiled]:
        kinds = {p.name: specialised(launch.arguments[p.name], p.is_constexpr) for p in launch.kernel.params}
        constants = {name: launch.arguments[name] for name, (kind, _) in kinds.items() if kind is None}
        signature = {name: kind or "constexpr" for name, (kind, _) in kinds.items()}
        attributes = {(i,): [["tt.divisibility", ALIGNED]] for i, (_, aligned) in enumerate(kinds.values()) if aligned}
        key = (launch.kernel, repr(signature), repr(constants), repr(attributes), repr(launch.options))
        if key not in self.built:
            self.built[key] = build(launch.kernel, signature, constants, attributes, launch.options, self.architecture)
        return [name for name, kind in signature.items() if kind != "constexpr"], self.built[key]

    def run(self, launch: Launch, grid: tuple[int, ...]) -> None:
        """Execute all blocks; tensors are changed in place."""
        name, names, made = self.program_of(launch)
        memory, places = Memory(), {}
        values = [launch.arguments[n] for n in names]
        for value in values:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in places:
                raw = storage(value)
                places[value.untyped_storage().data_ptr()] = memory.add(raw), raw
        numbers = [places[v.untyped_storage().data_ptr()][0] + v.storage_offset() * v.element_size() if isinstance(v, Tensor) else v for v in values]
        started = time.perf_counter()
        self.record.instructions += execute(made.program, grid, numbers, made.shared, memory)
        self.record.seconds += time.perf_counter() - started
        self.record.blocks += int(np.prod(grid))
        self.record.launches[name] += 1
        self.record.reports += [f"{name}: {report}" for report in memory.reports]
        for address, raw in places.values():
            raw[:] = memory.get(address, raw)


@contextmanager
def executed(architecture: int, cases: list[CompileCase] = ()) -> Iterator[Record]:
    """Within it, in this process, every launch of a Triton kernel on CPU tensors runs its PTX for the architecture."""
    from triton.runtime.jit import JITFunction

    executor, original = Executor(architecture, list(cases)), JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in self.arg_names}
        bound = inspect.signature(self.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        launch = Launch(self, dict(bound.arguments), options)
        executor.run(launch, grid(launch.arguments) if callable(grid) else grid)

    JITFunction.run = run
    try:
        yield executor.record
    finally:
        JITFunction.run = original
