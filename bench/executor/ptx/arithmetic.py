"""Arithmetic, logic, comparisons and shifts. Approximate functions are as exact as float32 is; float16 and bf16 are rounded once from float64."""

from collections.abc import Callable

import numpy as np

from . import fragments
from .block import Block
from .operands import Effect, builds, elementwise, floating, only_known, require, source
from .program import TYPES, Instruction, Program

HALVES = ("bf16x2", "f16x2", "bf16")
SMALLEST_NORMAL = np.float32(2**-126)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 as zero."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def wide(kind: str) -> str:
    """The type of twice the bits."""
    return kind[0] + str(2 * int(kind[1:]))


def flushing(step: Instruction) -> Callable:
    """What `.ftz` does to operands and results; nothing without it."""
    return flush if "ftz" in step.mods else lambda x: x


def in_halves(program: Program, step: Instruction, function: Callable) -> Effect:
    """Arithmetic on bf16 or on pairs of 16-bit floats: in float64, rounded once."""
    bf16 = step.type.startswith("bf16")

    def run(*operands: np.ndarray) -> np.ndarray:
        if step.type == "bf16":
            return fragments.round_bf16(function(*[fragments.from_bf16(x).astype(np.float64) for x in operands]).astype(np.float32))
        pairs = [fragments.halves(np.atleast_1d(x), bf16).astype(np.float64) for x in operands]
        return fragments.pack(function(*pairs).astype(np.float32), bf16)

    return elementwise(program, step, run, [step.type] * (len(step.operands) - 1))


def in_integer_halves(function: Callable, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A function of 16-bit integers on both halves of 32-bit ones."""
    x, y = (np.ascontiguousarray(v)[..., None].view(np.uint16) for v in (a, b))
    return np.ascontiguousarray(function(x, y)).view(np.uint32)[..., 0]


BINARY = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
LOGICAL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@builds(*BINARY)
def binary(program: Program, step: Instruction) -> Effect:
    only_known(step, {"rn", "ftz"})
    kind = step.type
    function = LOGICAL[step.op] if kind == "pred" else BINARY[step.op]
    if kind in HALVES:
        return in_halves(program, step, function)
    if kind in ("s16x2", "u16x2"):
        return elementwise(program, step, lambda a, b: in_integer_halves(function, a, b), ["b32"] * 2)
    ftz = flushing(step)
    return elementwise(program, step, (lambda a, b: ftz(function(ftz(a), ftz(b)))) if "ftz" in step.mods else function, [kind] * 2)


@builds("mul")
def multiply(program: Program, step: Instruction) -> Effect:
    kind = step.type
    if kind in HALVES:
        return in_halves(program, step, np.multiply)
    if "wide" in step.mods:
        made = TYPES[wide(kind)]
        return elementwise(program, step, lambda a, b: a.astype(made) * b.astype(made), [kind] * 2, wide(kind))
    if "hi" in step.mods:
        double, bits = object if kind[1:] == "64" else TYPES[wide(kind)], int(kind[1:])
        return elementwise(program, step, lambda a, b: (a.astype(double) * b.astype(double)) >> bits, [kind] * 2)
    only_known(step, {"rn", "ftz", "lo"})
    ftz = flushing(step)
    return elementwise(program, step, lambda a, b: ftz(ftz(a) * ftz(b)), [kind] * 2)


@builds("mad")
def multiply_add(program: Program, step: Instruction) -> Effect:
    kind = step.type
    only_known(step, {"lo", "wide"})
    if "wide" in step.mods:
        made = TYPES[wide(kind)]
        return elementwise(program, step, lambda a, b, c: a.astype(made) * b.astype(made) + c, [kind, kind, wide(kind)], wide(kind))
    return elementwise(program, step, lambda a, b, c: a * b + c, [kind] * 3)


@builds("fma")
def fused(program: Program, step: Instruction) -> Effect:
    """The multiplication is exact in float64; the sum is rounded twice, which differs from the hardware once in 2^29."""
    only_known(step, {"rn", "ftz"})
    if step.type in HALVES:
        return in_halves(program, step, lambda a, b, c: a * b + c)
    require(step.type == "f32", step)
    ftz = flushing(step)
    return elementwise(program, step, lambda a, b, c: ftz((ftz(a).astype(np.float64) * ftz(b) + ftz(c)).astype(np.float32)), ["f32"] * 3)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of integers, rounded to zero; a division by zero gives whatever a division by one does."""
    b = np.where(b == 0, 1, b)
    if a.dtype.kind == "u":
        return a // b
    rounded_down = a // b
    return rounded_down + ((a % b != 0) & ((a < 0) ^ (b < 0))).astype(a.dtype)


@builds("div")
def divide(program: Program, step: Instruction) -> Effect:
    only_known(step, {"full", "rn", "approx", "ftz"})
    return elementwise(program, step, np.divide if floating(step.type) else quotient, [step.type] * 2)


@builds("rem")
def remainder(program: Program, step: Instruction) -> Effect:
    return elementwise(program, step, lambda a, b: a - quotient(a, b) * b, [step.type] * 2)


@builds("min", "max")
def extreme(program: Program, step: Instruction) -> Effect:
    only_known(step, {"NaN", "ftz"})
    require(step.type not in HALVES, step)
    quiet, loud = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[step.op]
    return elementwise(program, step, loud if "NaN" in step.mods or not floating(step.type) else quiet, [step.type] * 2)


UNARY = {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2,
    "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "clz": lambda x: 32 - np.frexp(x.astype(np.float64))[1],
    "popc": lambda x: np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(-1, 4), axis=1).sum(1),
}  # fmt: skip


@builds(*UNARY)
def unary(program: Program, step: Instruction) -> Effect:
    only_known(step, {"approx", "ftz", "rn"})
    function = np.logical_not if step.type == "pred" else UNARY[step.op]
    if step.type in HALVES:
        return in_halves(program, step, function)
    if step.op == "ex2":
        return elementwise(program, step, lambda x: flush(np.exp2(flush(x).astype(np.float64)).astype(np.float32)), ["f32"])
    return elementwise(program, step, function, [step.type])


@builds("shl", "shr")
def shift(program: Program, step: Instruction) -> Effect:
    """Shifts of the width or more give zero, or the sign."""
    bits = TYPES[step.type].itemsize * 8

    def run(a: np.ndarray, n: np.ndarray) -> np.ndarray:
        near = np.minimum(n, bits - 1).astype(a.dtype)
        if step.op == "shl":
            return np.where(n < bits, a << near, 0)
        return a >> near if a.dtype.kind == "i" else np.where(n < bits, a >> near, 0)

    return elementwise(program, step, run, [step.type, "u32"])


@builds("shf")
def funnel_shift(program: Program, step: Instruction) -> Effect:
    """shf.l/r.wrap/clamp.b32: the upper or lower half of a shifted pair."""
    left, wrap = "l" in step.mods, "wrap" in step.mods

    def run(low: np.ndarray, high: np.ndarray, n: np.ndarray) -> np.ndarray:
        pair = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        n = (n & 31 if wrap else np.minimum(n, 32)).astype(np.uint64)
        return (((pair << n) >> np.uint64(32)) if left else (pair >> n)).astype(np.uint32)

    return elementwise(program, step, run, ["b32"] * 3)


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "equ": np.equal, "neu": np.not_equal, "ltu": np.less, "leu": np.less_equal, "gtu": np.greater, "geu": np.greater_equal,
}  # fmt: skip


@builds("setp")
def compare(program: Program, step: Instruction) -> Effect:
    only_known(step, {*COMPARE, "nan", "num", "and", "or", "ftz"})
    relation, kind = step.mods[0], step.type
    if kind in ("bf16x2", "f16x2"):
        return compare_pairs(program, step, COMPARE[relation])

    def run(a: np.ndarray, b: np.ndarray, *other: np.ndarray) -> np.ndarray:
        if not floating(kind):
            made = COMPARE[relation](a, b)
        else:
            unordered = np.isnan(a) | np.isnan(b)
            if relation in ("nan", "num"):
                made = unordered == (relation == "nan")
            else:
                made = (COMPARE[relation](a, b) | unordered) if relation.endswith("u") else (COMPARE[relation](a, b) & ~unordered)
        return made & other[0] if "and" in step.mods else made | other[0] if "or" in step.mods else made

    return elementwise(program, step, run, [kind, kind] + ["pred"] * (len(step.operands) - 3), "pred")


def compare_pairs(program: Program, step: Instruction, relation: Callable) -> Effect:
    """setp p|q: p from the low halves, q from the high ones; a NaN makes neither true."""
    low, high = step.operands[0].split("|")
    a, b = (source(program, text, TYPES["b32"]) for text in step.operands[1:3])
    require(len(step.mods) == 2 and step.mods[0] in ("lt", "le", "gt", "ge", "eq"), step)

    def run(block: Block, mask: np.ndarray) -> None:
        x, y = (fragments.halves(read(block), step.type == "bf16x2") for read in (a, b))
        made = np.broadcast_to(relation(x, y), (block.threads, 2))
        block.set(low, made[:, 0], mask)
        block.set(high, made[:, 1], mask)

    return run


@builds("selp")
def select(program: Program, step: Instruction) -> Effect:
    return elementwise(program, step, lambda a, b, p: np.where(p, a, b), [step.type, step.type, "pred"])
