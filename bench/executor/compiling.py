"""Triton kernels compiled for an architecture without a GPU, their PTX loaded."""

from dataclasses import dataclass

from smi.kernels.compile_case import CompileCase

from .ptx.launch import load
from .ptx.program import Program


@dataclass
class Compiled:
    """A kernel's program, PTX and machine code, and the bytes of shared memory that a block takes."""

    program: Program
    text: str
    binary: bytes
    shared: int


def build(kernel, signature: dict[str, str], constants: dict, attributes: dict, options: dict, architecture: int) -> Compiled:
    """signature: Triton types of all arguments; attributes: divisibility by 16, in Triton's form; options: num_warps, ...; architecture: capability
    times 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return Compiled(load(made.asm["ptx"]), made.asm["ptx"], made.asm["cubin"], made.metadata.shared)


def build_case(case: CompileCase, architecture: int) -> Compiled:
    """A configuration as the compile gate compiles it."""
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages} | ({"maxnreg": case.maxnreg} if case.maxnreg else {})
    return build(case.kernel, case.signature(), case.constants, case.attributes(), options, architecture)
