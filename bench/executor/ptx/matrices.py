"""Instructions of the tensor cores: ldmatrix, stmatrix, mma, and wgmma, which is asynchronous. Sums are in float64, rounded once an instruction."""

import re
from dataclasses import dataclass

import numpy as np

from . import fragments
from .block import Block, Multiplication
from .operands import Effect, address, builds, names_in, require, source
from .program import TYPES, Fault, Instruction, Program

GROUP = 128  # threads of a warpgroup
M, K = 64, 16  # rows and depth of one wgmma of 16-bit numbers


@builds("ldmatrix", "stmatrix")
def matrix_rows(program: Program, step: Instruction) -> Effect:
    """8x8 matrices of 16 bits, whose rows lie where lanes 8 i to 8 i + 7 say for the i-th."""
    loads = step.op == "ldmatrix"
    registers, place = names_in(step.operands[0 if loads else 1]), address(program, step.operands[1 if loads else 0])
    count, transposed = int(next(m for m in step.mods if re.match(r"x\d$", m))[1:]), "trans" in step.mods
    require("m8n8" in step.mods and step.type == "b16" and count == len(registers), step)

    def run(block: Block, mask: np.ndarray) -> None:
        lanes = block.whole(mask, 32, step)
        rows = place(block)[lanes].reshape(-1, 32)[:, : 8 * count].reshape(-1)
        warp = np.repeat(block.warp[lanes[::32]], 8 * count)
        index = block.shared.index(rows, 16, step)
        if loads:
            values = fragments.to_registers(block.shared.read(index, warp, step).view(np.uint16).reshape(-1, count, 8, 8), transposed)
            block.scatter(registers, lanes, values, mask)
        else:
            tiles = fragments.of_registers(block.gather(registers, lanes), transposed)
            block.shared.write(index, warp, tiles.reshape(-1, 8).view(np.uint8), step)

    return run


@builds("mma")
def matrix_multiply(program: Program, step: Instruction) -> Effect:
    """mma.sync m16n8k16 of 16-bit floats and m16n8k8 of tf32, float32 accumulators."""
    shape, *_, d, a, b, c = [m for m in step.mods if m not in ("sync", "aligned")]
    require((shape, a) in (("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")) and (d, c) == ("f32", "f32") and a == b, step)
    names = [names_in(text) for text in step.operands]

    def run(block: Block, mask: np.ndarray) -> None:
        lanes = block.whole(mask, 32, step)
        a_raw, b_raw, c_raw = (block.gather(n, lanes) for n in names[1:])
        made = fragments.a_tile(a_raw, a) @ fragments.b_tile(b_raw, a) + fragments.c_tile(c_raw.view(np.float32))
        block.scatter(names[0], lanes, fragments.of_c_tile(made), mask)

    return run


@dataclass
class Wgmma:
    """What a wgmma names: accumulators, A in registers or by descriptor, B by descriptor, whether they lie transposed, and N."""

    step: Instruction
    kind: str
    n: int
    accumulators: list[str]
    left: list[str]  # registers of A, or its one descriptor
    right: str
    left_in_registers: bool
    left_transposed: bool
    right_transposed: bool


def read_wgmma(step: Instruction) -> Wgmma:
    """m64nNk16 of bf16 or float16 with float32 accumulators; others are refused."""
    shape = re.match(rf"m{M}n(\d+)k{K}$", step.mods[3])
    known = step.mods[:3] == ["mma_async", "sync", "aligned"] and shape and step.mods[4:] in (["f32", "bf16", "bf16"], ["f32", "f16", "f16"])
    require(bool(known), step)
    d, a, b, _, scale_a, scale_b, *transposed = step.operands
    in_registers = a.startswith("{")
    require((scale_a, scale_b) == ("1", "1") and len(transposed) == (1 if in_registers else 2), step)
    return Wgmma(step, step.mods[5], int(shape[1]), names_in(d), names_in(a), b, in_registers, transposed[0] == "1", transposed[-1] == "1")


def matrix_in_shared(block: Block, what: Wgmma, name: str, lanes: np.ndarray, rows: int, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """[groups, rows, 16] in float64 by a descriptor, and the indices of its bytes."""
    descriptors = block.registers[name][lanes].reshape(-1, GROUP)
    if (descriptors != descriptors[:, :1]).any():
        raise Fault(f"{what.step}: descriptors differ within a warpgroup")
    place = np.stack([fragments.described(int(one), rows, transposed) for one in descriptors[:, 0]])
    index = block.shared.index(place.reshape(-1), 2, what.step)
    groups = len(descriptors)
    raw = block.shared.read_by_groups(index.reshape(groups, -1), block.warp[lanes].reshape(groups, GROUP)[:, ::32], what.step)
    return fragments.as_floats(raw.view(np.uint16), what.kind).astype(np.float64).reshape(groups, rows, K), index


def start_wgmma(block: Block, what: Wgmma, keep: np.ndarray, mask: np.ndarray) -> None:
    """Operands are read at once, and compared at the wait; accumulators are poison until then. keep: whether they are added to."""
    lanes = block.whole(mask, GROUP, what.step)
    right, used = matrix_in_shared(block, what, what.right, lanes, what.n, what.right_transposed)
    if what.left_in_registers:
        left = fragments.a_tile(block.gather(what.left, lanes), what.kind).reshape(-1, M, K)
    else:
        left, more = matrix_in_shared(block, what, what.left[0], lanes, M, what.left_transposed)
        used = np.concatenate([used, more])
    before = {name: block.registers[name] for name in what.accumulators}
    for earlier in block.multiplications:
        before |= {name: value for name, value in earlier.results.items() if name in before}
    old = fragments.wide_tile(np.stack([before[name][lanes] for name in what.accumulators], 1).view(np.float32))
    added = np.broadcast_to(keep, block.threads)[lanes].reshape(-1, GROUP)[:, :1, None]
    made = fragments.of_wide_tile(np.where(added, old, 0) + left @ right.transpose(0, 2, 1))
    results = {}
    for i, name in enumerate(what.accumulators):
        results[name] = before[name].copy()
        results[name][lanes] = made[:, i].view(block.registers[name].dtype)
        block.registers[name] = np.where(mask, np.uint32(0xFFFFFFFF).view(block.registers[name].dtype), block.registers[name])
    held = what.left if what.left_in_registers else []
    block.held |= dict.fromkeys(held, what.step)
    block.multiplications.append(Multiplication(what.step, results, used, block.shared.bytes[used], held))


def commit_wgmma(block: Block, mask: np.ndarray) -> None:
    for one in block.multiplications:
        one.group = block.group if one.group is None else one.group
    block.group += 1


def finish_wgmma(block: Block, left: int, step: Instruction) -> None:
    """Wait for all groups but the last `left`: their accumulators become readable."""
    done = [one for one in block.multiplications if one.group is not None and one.group < block.group - left]
    for one in done:
        if not (block.shared.bytes[one.index] == one.bytes).all():
            block.memory.report(f"race: an operand of wgmma changed before the wait of line {step.line}: {one.step}")
        block.registers |= one.results
    block.multiplications = [one for one in block.multiplications if not any(one is finished for finished in done)]
    block.held = {name: one.step for one in block.multiplications for name in one.left}


@builds("wgmma")
def group_multiply(program: Program, step: Instruction) -> Effect:
    if "fence" in step.mods:
        return lambda block, mask: None
    if "commit_group" in step.mods:
        return commit_wgmma
    if "wait_group" in step.mods:
        left = int(step.operands[0])
        return lambda block, mask: finish_wgmma(block, left, step)
    what, keep = read_wgmma(step), source(program, step.operands[3], TYPES["pred"])
    return lambda block, mask: start_wgmma(block, what, keep(block), mask)
