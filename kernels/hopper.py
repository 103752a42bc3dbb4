"""Orderings that sm_90 asks for and Triton or ptxas leave out; in the compiler for another architecture, and interpreted, both functions do nothing.

wgmma reads shared memory by another path than stores and cp.async write it (the asynchronous proxy): a proxy fence must lie between. Triton before
3.7.1 has none after cp.async. Its registers must not change before it is waited for: Triton pipelines wgmma with A in registers and lets the next
step overwrite them, and ptxas before 13.1 reuses them. bench/executor/ finds both in compiled kernels.
"""

import re

import triton
import triton.language as tl

TRITON = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))  # the version in use
FENCES_COPIES = TRITON >= (3, 7, 1)
FENCE = tl.constexpr("" if FENCES_COPIES else "fence.proxy.async.shared::cta; mov.u32 $0, 0;")  # an instruction needs a result
SAME_REGISTERS = tl.constexpr("=f,0")


@triton.jit
def fence_copies(b_w):
    """Before a `tl.dot` of tile b_w, which `tl.load` fetched ahead: wgmma sees it, and all that came before it."""
    _fence(b_w, FENCE)


@triton.jit
def settled(b_sum, b_w):
    """float32 b_sum, the `tl.dot` of a loop with a tile b_w, once it is complete: no wgmma of a step runs into the next. No instruction."""
    return _settle(b_sum, b_w, SAME_REGISTERS)


def _on_hopper(operand, semantic) -> bool:
    """Whether `tl.dot` of such numbers is a wgmma: compiled for sm_90, of 16 bits. semantic: the compiler's, None where a kernel is interpreted."""
    return semantic is not None and str(semantic.builder.options.arch).startswith("sm90") and operand.dtype.primitive_bitwidth == 16


def _fence(b_w, asm, _semantic=None):
    if asm.value and _on_hopper(b_w, _semantic):
        tl.inline_asm_elementwise(asm, "=r", [], tl.int32, False, 1, _semantic=_semantic)


def _settle(b_sum, b_w, constraints, _semantic=None):
    if not _on_hopper(b_w, _semantic):
        return b_sum
    return tl.inline_asm_elementwise("", constraints, [b_sum], tl.float32, True, 1, _semantic=_semantic)


# Called while a kernel is compiled, with the compiler's semantic. Triton's cache does not see into them: what they write is an argument.
_fence.__triton_builtin__ = _settle.__triton_builtin__ = True
