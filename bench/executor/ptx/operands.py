"""Operands of an instruction, as functions that read them of a block; and the table of what builds an instruction's effect."""

import re
from collections.abc import Callable

import numpy as np

from .block import Block
from .memory import SHARED_BASE
from .program import TYPES, Instruction, Program

Read = Callable[[Block], np.ndarray]
Effect = Callable[[Block, np.ndarray], None]  # of an instruction on the threads of a mask
BUILDERS: dict[str, Callable[[Program, Instruction], Effect]] = {}


def builds(*ops: str):
    """Enter a function that builds the effect of instructions with these names."""

    def register(builder):
        BUILDERS.update(dict.fromkeys(ops, builder))
        return builder

    return register


def require(condition: bool, step: Instruction) -> None:
    """Refuse what is not modelled."""
    if not condition:
        raise NotImplementedError(f"not modelled: {step}")


def only_known(step: Instruction, known: set[str]) -> None:
    """Refuse an instruction with other modifiers than these, its type apart."""
    require(not set(step.mods[:-1]) - known, step)


def floating(kind: str) -> bool:
    return kind in ("f16", "f32", "f64")


def literal(text: str, kind: np.dtype) -> np.ndarray | None:
    """An immediate as an array of one; None if the text is not one."""
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        return np.array([int(text[2:], 16)], np.uint32).view(kind if kind.itemsize == 4 else np.uint32)
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        return np.array([int(text[2:], 16)], np.uint64).view(kind)
    if re.match(r"-?(0x[0-9a-fA-F]+|\d+)U?$", text):
        value = int(text.rstrip("U"), 0)
        if kind.kind == "b":
            return np.array([value != 0])
        raw = np.array([value & ((1 << 8 * kind.itemsize) - 1)], np.uint64).astype(f"u{kind.itemsize}")
        return raw.view(kind)
    return None


def shared_address(program: Program, name: str) -> int | None:
    """Address of a variable in shared memory; None if there is none of this name. Dynamic ones lie behind all others."""
    if name not in program.variables:
        return None
    offset = program.variables[name]
    return SHARED_BASE + (program.static_bytes if offset is None else offset)


def source(program: Program, text: str, kind: np.dtype) -> Read:
    """A function that reads an operand as this type, of a wider register the low bits."""
    constant = literal(text, kind)
    if constant is None and (place := shared_address(program, text)) is not None:
        constant = np.array([place], np.int64).astype(kind)
    if constant is not None:
        return lambda block: constant

    def read(block: Block) -> np.ndarray:
        value = block.registers[text]
        if value.dtype == kind:
            return value
        if value.dtype.itemsize > kind.itemsize:
            value = value.astype(f"u{kind.itemsize}")
        return value.view(kind) if value.dtype.itemsize == kind.itemsize else value.astype(kind)

    return read


def names_in(text: str) -> list[str]:
    """Registers of a vector operand, or the one."""
    return [name.strip() for name in text.strip("{} ").split(",")]


def address(program: Program, text: str) -> Read:
    """[register + offset] or [variable + offset], as uint64 over the threads."""
    base, offset = re.match(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]$", text).groups()
    shift = np.uint64(int(offset or 0) & (2**64 - 1))
    if (place := shared_address(program, base)) is not None:
        return lambda block: np.full(block.threads, place, np.uint64) + shift
    return lambda block: block.registers[base].astype(np.uint64) + shift


def elementwise(program: Program, step: Instruction, function: Callable, kinds: list[str], result: str | None = None) -> Effect:
    """target = function(operands of these types), thread by thread; result: its type, that of the first operand if not given."""
    reads = [source(program, text, TYPES[kind]) for text, kind in zip(step.operands[1:], kinds, strict=True)]
    target, made = step.operands[0], TYPES[result or kinds[0]]

    def run(block: Block, mask: np.ndarray) -> None:
        block.set(target, np.asarray(function(*[read(block) for read in reads])).astype(made, copy=False), mask)

    return run
