"""One thread block: its registers, every one an array over the threads, its shared memory, and what is in flight."""

from dataclasses import dataclass, field

import numpy as np

from .memory import POISON, Memory, Shared
from .program import Fault, Instruction, Program


@dataclass
class Copy:
    """A cp.async in flight: for lanes and their groups, data [lanes, size] for an index into shared memory."""

    lane: np.ndarray
    group: np.ndarray
    index: np.ndarray
    data: np.ndarray

    def part(self, chosen: np.ndarray) -> "Copy":
        return Copy(self.lane[chosen], self.group[chosen], self.index[chosen], self.data[chosen])


@dataclass
class Multiplication:
    """A wgmma in flight: accumulators after it by register, its operands in shared memory, bytes at an index, and the registers of A."""

    step: Instruction
    results: dict[str, np.ndarray]
    index: np.ndarray
    bytes: np.ndarray
    left: list[str]
    group: int | None = None  # None until it is committed


@dataclass
class Grid:
    """Sizes of a launch: blocks by axis, threads and bytes of shared memory of each."""

    blocks: tuple[int, int, int]
    threads: int
    shared: int


@dataclass
class Block:
    """Threads of one block at a place in the grid. values: bytes of the parameters by name."""

    program: Program
    memory: Memory
    grid: Grid
    place: tuple[int, int, int]
    values: dict[str, np.ndarray]
    copies: list[Copy] = field(default_factory=list)
    multiplications: list[Multiplication] = field(default_factory=list)
    held: dict[str, Instruction] = field(default_factory=dict)  # registers with A of a wgmma in flight
    group: int = 0  # of wgmma, the next to be committed
    executed: int = 0  # instructions

    def __post_init__(self):
        threads = self.threads = self.grid.threads
        self.all = np.ones(threads, bool)
        self.warp = np.arange(threads) // 32
        self.copy_group = np.zeros(threads, np.int64)
        self.shared = Shared(self.program.static_bytes + self.grid.shared, self.memory)
        self.registers = {name: np.full(threads, POISON, np.uint8).astype(kind) for name, kind in self.program.registers.items()}
        lane = np.arange(threads, dtype=np.uint32)
        special = {"%tid.x": lane, "%tid.y": lane * 0, "%tid.z": lane * 0, "%laneid": lane % 32, "%warpid": lane // 32, "%ntid.x": lane * 0 + threads}
        for axis, at, size in zip("xyz", self.place, self.grid.blocks, strict=True):
            special |= {f"%ctaid.{axis}": lane * 0 + np.uint32(at), f"%nctaid.{axis}": lane * 0 + np.uint32(size)}
        self.registers |= special

    def run(self) -> None:
        """Threads at the lowest segment go first, until all have ended; a barrier holds them until all others wait or have ended."""
        segments = self.program.segments
        at, waiting, ended = np.zeros(self.threads, np.int64), ~self.all, ~self.all
        while not ended.all():
            ready = ~ended & ~waiting
            if not ready.any():
                waiting[:] = False
                self.shared.barrier()
                continue
            here = at[ready].min()
            if here >= len(segments):
                break
            active = ready & (at == here)
            active = self.all if active.all() else active
            at[active] = here + 1
            for step in segments[here]:
                mask = active
                if step.guard:
                    mask = active & (self.registers[step.guard] ^ step.negated)
                    mask = self.all if mask.all() else mask
                self.executed += 1
                if step.op == "bra":
                    at[mask] = self.program.labels[step.operands[0]]
                elif step.op in ("ret", "exit"):
                    ended |= mask
                elif step.is_barrier:
                    waiting |= mask
                elif mask is self.all or mask.any():
                    step.run(self, mask)

    def set(self, name: str, value: np.ndarray, mask: np.ndarray) -> None:
        """Assign to a register, of another width with extension or truncation, in the threads of the mask."""
        kind = self.program.registers[name]
        if value.dtype != kind:
            value = fitted(value, kind)
        if mask is self.all:
            self.registers[name] = value if value.shape == mask.shape else np.broadcast_to(value, mask.shape)
        else:
            self.registers[name] = np.where(mask, value, self.registers[name])
        if name in self.held:
            self.memory.report(f"register: {name} is assigned while a wgmma in flight reads it: {self.held[name]}")

    def whole(self, mask: np.ndarray, threads: int, step: Instruction) -> np.ndarray:
        """Threads of the mask; raises Fault unless it is made of whole groups of `threads`."""
        groups = mask.reshape(-1, threads)
        if (groups.any(1) != groups.all(1)).any():
            raise Fault(f"{step}: not by whole groups of {threads} threads")
        return mask.nonzero()[0]

    def gather(self, names: list[str], lanes: np.ndarray) -> np.ndarray:
        """Registers side by side: [lanes, registers]."""
        return np.stack([self.registers[name][lanes] for name in names], 1)

    def scatter(self, names: list[str], lanes: np.ndarray, values: np.ndarray, mask: np.ndarray) -> None:
        """The inverse: values [lanes, registers]."""
        for i, name in enumerate(names):
            full = np.zeros(self.threads, values.dtype)
            full[lanes] = values[:, i]
            self.set(name, full, mask)


def fitted(value: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Bits of a value in a register of this type: sign or zero extended, or its low bits."""
    if value.dtype.kind == "b" or kind.kind == "b":
        return value.astype(kind)
    if value.dtype.itemsize == kind.itemsize:
        return value.view(kind)
    if value.dtype.itemsize < kind.itemsize and value.dtype.kind in "iu":
        return value.astype(f"{value.dtype.kind}{kind.itemsize}").view(kind)
    return value.view(f"u{value.dtype.itemsize}").astype(kind)
