"""Runs a parsed kernel: all blocks of a launch in order, on arrays or on a memory that the caller fills."""

import numpy as np

from . import arithmetic, conversion, matrices, transfers  # noqa: F401  what they know enters BUILDERS
from .block import Block, Grid
from .memory import Memory
from .operands import BUILDERS, require
from .program import TYPES, Parameter, Program, parse


def load(text: str, name: str | None = None) -> Program:
    """A kernel of a PTX text, ready to run. Raises NotImplementedError for an instruction that is not modelled, ValueError where there is no such
    kernel."""
    program = parse(text, name)
    for step in program.instructions():
        require(step.op in BUILDERS, step)
        step.run = BUILDERS[step.op](program, step)
    return program


def bytes_of(parameter: Parameter, number) -> np.ndarray:
    """A parameter as the kernel finds it; bytes are taken as they are."""
    if isinstance(number, bytes):
        return np.frombuffer(number, np.uint8)
    kind = TYPES[parameter.kind]
    if kind.kind == "f":
        return np.array([number], kind).view(np.uint8)
    return np.array([int(number) & (2 ** (8 * kind.itemsize) - 1)], f"u{kind.itemsize}").view(np.uint8)


def execute(program: Program, blocks: tuple[int, ...], numbers: list, shared: int, memory: Memory, threads: int | None = None) -> int:
    """Run all blocks in order; how many instructions ran. numbers: of the parameters in order, addresses for pointers, bytes for structs; those that
    are missing are null. shared: bytes of dynamic shared memory. threads: of a block, where the program does not say."""
    given = [*numbers, *[0] * (len(program.parameters) - len(numbers))]
    values = {parameter.name: bytes_of(parameter, number) for parameter, number in zip(program.parameters, given, strict=True)}
    sizes = (*blocks, 1, 1)[:3]
    grid, executed = Grid(sizes, program.threads or threads, shared), 0
    with np.errstate(all="ignore"):
        for z, y, x in np.ndindex(*sizes[::-1]):
            block = Block(program, memory, grid, (x, y, z), values)
            block.run()
            executed += block.executed
    return executed


def launch(program: Program, blocks: tuple[int, ...], arguments: list, shared: int, threads: int | None = None) -> tuple[list, Memory]:
    """`execute` with arrays for pointers: the arrays afterwards (None for numbers), and the memory with its reports."""
    memory = Memory()
    numbers = [memory.add(x) if isinstance(x, np.ndarray) else x for x in arguments]
    execute(program, blocks, numbers, shared, memory, threads)
    return [memory.get(n, x) if isinstance(x, np.ndarray) else None for n, x in zip(numbers, arguments, strict=True)], memory
