"""What moves bits without arithmetic: moves, conversions of type, permutations of bytes, exchange between the threads of a warp."""

import numpy as np

from . import fragments
from .block import Block
from .operands import Effect, builds, elementwise, floating, names_in, only_known, require, source
from .program import TYPES, Fault, Instruction, Program

ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@builds("mov")
def move(program: Program, step: Instruction) -> Effect:
    """Also between a register and its parts."""
    target, origin = step.operands
    if target.startswith("{"):
        return unpack(program, step, names_in(target))
    if origin.startswith("{"):
        return pack(program, step, names_in(origin))
    return elementwise(program, step, lambda x: x, [step.type])


def unpack(program: Program, step: Instruction, parts: list[str]) -> Effect:
    """mov {low, high}, register; "_" is no register."""
    kind = program.registers[next(part for part in parts if part != "_")]
    read = source(program, step.operands[1], TYPES[step.type])

    def run(block: Block, mask: np.ndarray) -> None:
        for part, value in zip(parts, np.broadcast_to(read(block), block.threads)[:, None].copy().view(kind).T, strict=True):
            if part != "_":
                block.set(part, value, mask)

    return run


def pack(program: Program, step: Instruction, parts: list[str]) -> Effect:
    """mov register, {low, high}."""
    whole = TYPES[step.type]
    reads = [source(program, part, TYPES[f"b{whole.itemsize * 8 // len(parts)}"]) for part in parts]

    def run(block: Block, mask: np.ndarray) -> None:
        halves = np.stack([np.broadcast_to(read(block), block.threads) for read in reads], 1)
        block.set(step.operands[0], np.ascontiguousarray(halves).view(whole)[:, 0], mask)

    return run


@builds("cvta")
def convert_address(program: Program, step: Instruction) -> Effect:
    """Global addresses are generic ones; those of shared memory are not modelled as such."""
    require("global" in step.mods, step)
    return elementwise(program, step, lambda x: x, [step.type])


@builds("cvt")
def convert(program: Program, step: Instruction) -> Effect:
    to, of = step.mods[-2:]
    rounding = set(step.mods[:-2])
    require(not rounding - {*ROUNDINGS, "rn", "rna", "ftz", "rz"}, step)
    if to in ("bf16x2", "f16x2") and of == "f32" and "rn" in rounding:
        bf16 = to == "bf16x2"
        return elementwise(program, step, lambda high, low: fragments.pack(np.stack(np.broadcast_arrays(low, high), -1), bf16), ["f32"] * 2, "b32")
    if (to, of) == ("bf16", "f32") and "rn" in rounding:
        return elementwise(program, step, fragments.round_bf16, ["f32"], "b16")
    if (to, of) == ("f32", "bf16"):
        return elementwise(program, step, fragments.from_bf16, ["b16"], "f32")
    if to == "tf32" and "rna" in rounding:
        return elementwise(program, step, lambda x: (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000), ["b32"], "b32")
    require(to in TYPES and "bf16" not in (to, of), step)
    if floating(of) and not floating(to):
        whole = ROUNDINGS[next(r for r in rounding if r in ROUNDINGS)]
        edge = np.iinfo(TYPES[to])
        return elementwise(program, step, lambda x: np.nan_to_num(np.clip(whole(x.astype(np.float64)), edge.min, edge.max)), [of], to)
    return elementwise(program, step, lambda x: x, [of], to)


@builds("bfe")
def extract_bits(program: Program, step: Instruction) -> Effect:
    """bfe.u32/s32: `length` bits from bit `start` on, sign extended where the type has one."""
    require(step.type in ("u32", "s32"), step)

    def run(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        length = np.minimum(length.astype(np.int64), 32)
        piece = (a.astype(np.int64) >> np.minimum(start, 63).astype(np.int64)) & ((np.int64(1) << length) - 1)
        negative = (step.type == "s32") & (length > 0) & ((piece >> np.maximum(length - 1, 0)) & 1 == 1)
        return np.where(negative, piece - (np.int64(1) << length), piece)

    return elementwise(program, step, run, [step.type, "u32", "u32"])


@builds("prmt")
def permute(program: Program, step: Instruction) -> Effect:
    """Bytes of a pair of registers by the nibbles of the third."""
    require(step.mods == ["b32"], step)

    def run(a: np.ndarray, b: np.ndarray, select: np.ndarray) -> np.ndarray:
        pair = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        made = np.uint64(0)
        for i in range(4):
            nibble = (select.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
            byte = (pair >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), 255, 0), byte).astype(np.uint64)
            made = made | (byte << np.uint64(8 * i))
        return made.astype(np.uint32)

    return elementwise(program, step, run, ["b32"] * 3)


@builds("shfl")
def shuffle(program: Program, step: Instruction) -> Effect:
    """bfly, idx, up, down over whole warps: clamp 31, for up 0, and all members."""
    mode, (target, _, has_partner) = step.mods[1], step.operands[0].partition("|")
    value, by, clamp, members = (source(program, text, TYPES["b32"]) for text in step.operands[1:])

    def run(block: Block, mask: np.ndarray) -> None:
        chosen = [np.broadcast_to(read(block), block.threads)[mask] for read in (clamp, members)]
        require((chosen[0] == (0 if mode == "up" else 31)).all() and (chosen[1] == 0xFFFFFFFF).all(), step)
        lane = np.arange(block.threads) % 32
        n = np.broadcast_to(by(block), block.threads).astype(np.int64)
        other = {"bfly": lane ^ n, "idx": n & 31, "up": lane - n, "down": lane + n}[mode]
        inside = (other >= 0) & (other <= 31)
        other = np.where(inside, other, lane) + 32 * block.warp
        if not mask[other[mask]].all():
            raise Fault(f"{step}: from a thread that is not there")
        block.set(target, np.broadcast_to(value(block), block.threads)[other], mask)
        if has_partner:
            block.set(has_partner, inside, mask)

    return run


@builds("nop", "nanosleep")
def nothing(program: Program, step: Instruction) -> Effect:
    only_known(step, {"u32"})
    return lambda block, mask: None
