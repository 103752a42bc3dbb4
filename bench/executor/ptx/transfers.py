"""Loads, stores, asynchronous copies, fences and control flow."""

import numpy as np

from .block import Block, Copy
from .memory import COPIED, POISON
from .operands import Effect, address, builds, names_in, require, source
from .program import LAST, TYPES, Instruction, Program


@builds(*LAST, "membar", "griddepcontrol")
def control(program: Program, step: Instruction) -> Effect:
    """Control flow is Block.run's; a memory barrier orders what runs in order here."""
    if step.is_barrier:
        require("sync" in step.mods and step.operands == ["0"], step)
    return lambda block, mask: None


@builds("fence")
def fence(program: Program, step: Instruction) -> Effect:
    """A proxy fence makes a warp's own writes, and those behind a barrier, visible to wgmma; other fences order what runs in order here."""
    if "proxy" not in step.mods:
        return lambda block, mask: None
    require("async" in step.mods, step)
    return lambda block, mask: block.shared.fence(np.unique(block.warp[mask]))


@builds("ld")
def load(program: Program, step: Instruction) -> Effect:
    kind, targets = TYPES[step.type], names_in(step.operands[0])
    size = kind.itemsize * len(targets)
    if "param" in step.mods:
        return load_parameter(step, kind, targets)
    where = address(program, step.operands[1])

    def run(block: Block, mask: np.ndarray) -> None:
        place = where(block)[mask]
        if step.in_shared:
            data = block.shared.read(block.shared.index(place, size, step), block.warp[mask], step)
        else:
            data = block.memory.bytes[block.memory.index(place, size, step)]
        parts = data.view(kind)
        for i, target in enumerate(targets):
            value = np.zeros(block.threads, kind)
            value[mask] = parts[:, i]
            block.set(target, value, mask)

    return run


def load_parameter(step: Instruction, kind: np.dtype, targets: list[str]) -> Effect:
    name, _, offset = step.operands[1].strip("[] ").partition("+")
    start = int(offset or 0)

    def run(block: Block, mask: np.ndarray) -> None:
        raw = block.values[name.strip()]
        for i, target in enumerate(targets):
            at = start + i * kind.itemsize
            block.set(target, np.broadcast_to(raw[at : at + kind.itemsize].view(kind), block.threads), mask)

    return run


@builds("st")
def store(program: Program, step: Instruction) -> Effect:
    kind = TYPES[step.type]
    reads = [source(program, name, kind) for name in names_in(step.operands[1])]
    where, size = address(program, step.operands[0]), kind.itemsize * len(reads)

    def run(block: Block, mask: np.ndarray) -> None:
        data = np.stack([np.broadcast_to(read(block), block.threads)[mask] for read in reads], 1)
        data, place = np.ascontiguousarray(data).view(np.uint8), where(block)[mask]
        if step.in_shared:
            block.shared.write(block.shared.index(place, size, step), block.warp[mask], data, step)
        else:
            block.memory.bytes[block.memory.index(place, size, step)] = data

    return run


@builds("cp")
def copy_async(program: Program, step: Instruction) -> Effect:
    if "commit_group" in step.mods:
        return lambda block, mask: np.add.at(block.copy_group, mask.nonzero()[0], 1)
    if "wait_group" in step.mods or "wait_all" in step.mods:
        left = int(step.operands[0]) if step.operands else -1  # wait_all also waits for what was not committed
        return lambda block, mask: finish_copies(block, mask, left)
    require("bulk" not in step.mods, step)
    return start_copy(program, step)


def start_copy(program: Program, step: Instruction) -> Effect:
    """The destination is poison until a wait_group covers the copy. Without source bytes it becomes zero."""
    to, of, size = address(program, step.operands[0]), address(program, step.operands[1]), int(step.operands[2], 0)
    given = source(program, step.operands[3] if len(step.operands) > 3 else str(size), TYPES["b32"])

    def run(block: Block, mask: np.ndarray) -> None:
        lane = mask.nonzero()[0]
        length = np.broadcast_to(given(block), block.threads)[lane]
        require(np.isin(length, (0, size)).all(), step)
        data = np.zeros((len(lane), size), np.uint8)
        some = length > 0
        data[some] = block.memory.bytes[block.memory.index(of(block)[lane[some]], size, step)]
        index = block.shared.index(to(block)[lane], size, step)
        block.shared.write(index, block.warp[lane], np.full_like(data, POISON), step)
        block.copies.append(Copy(lane, block.copy_group[lane], index, data))

    return run


def finish_copies(block: Block, mask: np.ndarray, left: int) -> None:
    """Bring in what threads of the mask copied, their last `left` groups apart."""
    going = []
    for copy in block.copies:
        done = mask[copy.lane] & (copy.group < block.copy_group[copy.lane] - left)
        if done.any():
            block.shared.arrive(copy.index[done], block.warp[copy.lane[done]], copy.data[done], COPIED)
            copy = copy.part(~done)
        going.append(copy)
    block.copies = [copy for copy in going if len(copy.lane)]
