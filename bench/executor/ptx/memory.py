"""Global memory of a launch and shared memory of a block. What was never written, or is still in flight, is a NaN; who reads and writes is noted."""

import numpy as np

from .program import Fault, Instruction

SHARED_BASE = 1024  # where shared memory starts; the hardware keeps the first KiB
GLOBAL_BASE = 0x7F0000000000
GUARD = 1 << 16  # bytes between buffers
POISON = 0xFF  # byte of memory that was never written: four of them are a NaN in every floating-point type
STORED, COPIED = 1, 2  # how bytes came that wgmma may not see yet
MOST_REPORTS = 50


class Memory:
    """Global memory: buffers in one arena with guards between, at made-up addresses. reports: races and missing fences, as lines of text."""

    def __init__(self):
        self.bytes = np.zeros(GUARD, np.uint8)
        self.valid = np.zeros(GUARD, bool)
        self.reports: list[str] = []

    def add(self, array: np.ndarray) -> int:
        """Copy an array in; its address."""
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        start = len(self.bytes)
        padded = -(-raw.size // GUARD) * GUARD + GUARD
        self.bytes = np.concatenate([self.bytes, raw, np.full(padded - raw.size, POISON, np.uint8)])
        self.valid = np.concatenate([self.valid, np.ones(raw.size, bool), np.zeros(padded - raw.size, bool)])
        return GLOBAL_BASE + start

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        """What lies at an address now, of the shape and type of an array."""
        start = address - GLOBAL_BASE
        return self.bytes[start : start + like.nbytes].view(like.dtype).reshape(like.shape).copy()

    def report(self, text: str) -> None:
        if text not in self.reports and len(self.reports) < MOST_REPORTS:
            self.reports.append(text)

    def index(self, address: np.ndarray, size: int, step: Instruction) -> np.ndarray:
        """Indices [lanes, size] into `bytes`; raises Fault outside a buffer and where an address is no multiple of the size."""
        start = (address - np.uint64(GLOBAL_BASE)).astype(np.int64)
        inside = (start >= 0) & (start + size <= len(self.bytes)) & (start % size == 0)
        index = np.where(inside, start, 0)[:, None] + np.arange(size)
        inside &= self.valid[index[:, 0]] & self.valid[index[:, -1]]  # guards are wider than an access
        if not inside.all():
            raise Fault(f"{step}: address {int(address[~inside][0]):#x} is in no buffer or not aligned, {(~inside).sum()} lanes")
        return index


class Shared:
    """Shared memory of a block. readers, writers: by byte, a bit for every warp that did since the last barrier. unfenced: how bytes came that
    are not visible to wgmma yet, STORED or COPIED."""

    def __init__(self, size: int, memory: Memory):
        self.bytes = np.full(size, POISON, np.uint8)
        self.readers, self.writers = np.zeros(size, np.uint32), np.zeros(size, np.uint32)
        self.unfenced = np.zeros(size, np.uint8)
        self.memory = memory

    def barrier(self) -> None:
        self.readers[:] = 0
        self.writers[:] = 0

    def index(self, address: np.ndarray, size: int, step: Instruction) -> np.ndarray:
        """Indices [lanes, size] into `bytes`; raises Fault outside and where an address is no multiple of the size."""
        start = address.astype(np.int64) - SHARED_BASE
        if (start < 0).any() or (start + size > len(self.bytes)).any() or (start % size).any():
            raise Fault(f"{step}: shared addresses {int(start.min())} to {int(start.max())}, {len(self.bytes)} bytes are there")
        return start[:, None] + np.arange(size)

    def read(self, index: np.ndarray, warp: np.ndarray, step: Instruction) -> np.ndarray:
        """Bytes at an index [lanes, size] for lanes of these warps."""
        if (self.writers[index] & ~_bits(warp)).any():
            self.memory.report(f"race: reads what another warp wrote since the barrier: {step}")
        self._note(self.readers, index, warp)
        return self.bytes[index]

    def read_by_groups(self, index: np.ndarray, warps: np.ndarray, step: Instruction) -> np.ndarray:
        """Bytes at an index [groups, ...] that every warp [groups, 4] of a group reads, through the asynchronous proxy."""
        for group, members in zip(index, warps, strict=True):
            if self.writers[group].any():  # at least three of the four warps did not write it
                self.memory.report(f"race: reads what a warp wrote since the barrier: {step}")
            self.readers[group] |= np.bitwise_or.reduce(_bits(members)[:, 0])
            waiting = self.unfenced[group]
            for how, what in ((STORED, "a store"), (COPIED, "a cp.async")):
                if (waiting == how).any():
                    self.memory.report(f"fence: {what} is read by wgmma without a proxy fence between: {step}")
        return self.bytes[index]

    def write(self, index: np.ndarray, warp: np.ndarray, data: np.ndarray, step: Instruction) -> None:
        """Store bytes [lanes, size]. Two warps may store the same to one place."""
        bits = _bits(warp)
        if (self.readers[index] & ~bits).any():
            self.memory.report(f"race: writes what another warp read since the barrier: {step}")
        if ((self.writers[index] & ~bits).astype(bool) & (self.bytes[index] != data)).any():
            self.memory.report(f"race: overwrites what another warp wrote since the barrier: {step}")
        self.arrive(index, warp, data, STORED)

    def arrive(self, index: np.ndarray, warp: np.ndarray, data: np.ndarray, how: int) -> None:
        """Put bytes where they belong, as written by these warps."""
        self._note(self.writers, index, warp)
        self.bytes[index] = data
        self.unfenced[index] = how

    def fence(self, warps: np.ndarray) -> None:
        """A proxy fence of these warps: what they wrote, and what others wrote before the last barrier, becomes visible to wgmma."""
        own = np.bitwise_or.reduce(_bits(warps)[:, 0])
        self.unfenced[(self.writers == 0) | (self.writers & own).astype(bool)] = 0

    def _note(self, who: np.ndarray, index: np.ndarray, warp: np.ndarray) -> None:
        for one in np.unique(warp):  # lanes of two warps may name the same byte
            who[index[warp == one]] |= np.uint32(1 << one)


def _bits(warp: np.ndarray) -> np.ndarray:
    """[lanes, 1], a bit for each warp."""
    return (np.uint32(1) << warp.astype(np.uint32))[:, None]
