"""csrc's attention for sm_80: compiled to PTX by nvcc, executed, held against the reference through the public operation."""

import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from smi.csrc import build
from smi.kernels import dispatch
from smi.kernels.attention import cuda
from smi.kernels.attention import reference as attention_reference
from smi.kernels.attention.op import attention
from smi.kernels.comparison import Example

from .interposer import Record, storage
from .operations import Work, random
from .ptx.launch import execute, load
from .ptx.memory import Memory
from .ptx.program import Program, names

ARCHITECTURE = 80
WIDTHS = (32, 64, 80, 128)  # compiled for
TILE = 16  # tokens
STRIP_TILES = 4  # the most of the kernels that are made for a number of tiles
SPAN_TILES = 4  # of queries: a part of dS in long backward
SCORES_ROW = 128  # bytes of a row of P, of dS, or of a span of dS^T
SHARED_PER_BLOCK, SHARED_PER_PROCESSOR, SHARED_RESERVED = 163 << 10, 164 << 10, 1 << 10  # of ARCHITECTURE
NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
PARAMS = struct.Struct("<7Q5if??2xiii")  # AttentionParams of csrc/cuda/attention.h
TOKENS = (29, 47, 61, 99)  # two, three and four tiles, and the kernels for any number


class Choice(NamedTuple):
    """What attention_launch.cuh chooses: the start of the kernel's template arguments behind number and width, warps, bytes of shared memory."""

    kernel: str
    arguments: str
    warps: int
    shared: int
    spans: int = 0


def choose(backward: bool, width: int, tokens: int) -> Choice:
    """For a compiled width, as csrc/cuda/attention_launch.cuh."""
    tiles, row = -(-tokens // TILE), 2 * width
    most = cuda.MOST_TOKENS[width] // TILE  # a warp for every tile of keys in the longest sequence
    short = max(2, tiles)
    if tiles <= STRIP_TILES:
        if backward:
            return Choice("attention_backward_strip_kernel", f"Li{short}E", short, short * TILE * (4 * row + 2 * SCORES_ROW))
        return Choice("attention_forward_kernel", f"Li{short}E", short, 3 * short * TILE * row)
    if backward:
        spans = spans_for(width, tiles, most)
        return Choice("attention_backward_chunks_kernel", f"Li{most}E", tiles, chunks_bytes(row, tiles, spans), spans)
    turns = -(-tiles // (most // 2))
    return Choice("attention_forward_kernel", "Li0E", -(-tiles // turns), 3 * tiles * TILE * row)


def chunks_bytes(row: int, tiles: int, spans: int) -> int:
    """Shared memory of long backward. row: bytes of a row of q."""
    return tiles * TILE * (4 * row + spans * SCORES_ROW + 8)


def spans_for(width: int, tiles: int, most: int) -> int:
    """Spans of dS that are held at a time. most: warps of a multiprocessor."""

    def cost(spans: int) -> tuple[int, int, int]:
        needed, chunk = chunks_bytes(2 * width, tiles, spans), spans * SPAN_TILES
        resident = min(most // tiles, SHARED_PER_PROCESSOR // (needed + SHARED_RESERVED)) if needed <= SHARED_PER_BLOCK else 0
        units = width // (16 if width % 32 else 32)  # of a tile's dQ
        turns = sum(-(-min(chunk, tiles - first) * units // tiles) for first in range(0, tiles, chunk))
        return resident < min(most // tiles, SHARED_PER_PROCESSOR // (chunks_bytes(2 * width, tiles, 1) + SHARED_RESERVED)), turns, -spans

    return min(range(1, -(-tiles // SPAN_TILES) + 1), key=cost)


def compile_to_ptx(width: int) -> str:
    """The PTX of attention_WIDTH.cu."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.ptx"
        source = build.FOLDER / f"attention_{width}.cu"
        command = [build.nvcc(), *build.FLAGS, "-I", str(build.FOLDER), "-ptx", f"-arch=sm_{ARCHITECTURE}", "-o", str(made), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return made.read_text()


@dataclass
class Attention:
    """The raw functions of kernels/attention/cuda.py on CPU tensors, executed from PTX."""

    texts: dict[int, str]  # by compiled width
    programs: dict[str, Program] = field(default_factory=dict)
    record: Record = field(default_factory=Record)

    def forward(self, qkv: Tensor, index: Tensor | None, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        batch, rows, _, heads, width = qkv.shape
        tokens = rows if index is None else index.shape[1]
        new = torch.empty if lengths is None else torch.zeros
        out = new(batch, tokens, heads * width, dtype=qkv.dtype)
        lse = new(batch, heads, tokens, dtype=torch.float32)
        self._launch(False, qkv, index, lengths, out, lse, None, None, scale)
        return out, lse

    def backward(self, grad: Tensor, qkv: Tensor, index: Tensor | None, lengths: Tensor | None, out: Tensor, lse: Tensor, scale: float) -> Tensor:
        dqkv = torch.empty_like(qkv) if index is None and lengths is None else torch.zeros_like(qkv)
        self._launch(True, qkv.contiguous(), index, lengths, out, lse, grad.contiguous(), dqkv, scale)
        return dqkv

    def _program(self, width: int, number: str, choice: Choice) -> Program:
        start = f"{choice.kernel}INS_{len(number)}{number}ELi{width}E{choice.arguments}"
        if start not in self.programs:
            (name,) = (name for name in names(self.texts[width]) if start in name)
            self.programs[start] = load(self.texts[width], name)
        return self.programs[start]

    def _launch(self, backward: bool, qkv: Tensor, index, lengths, out, lse, grad, dqkv, scale: float) -> None:
        batch, rows, _, heads, width = qkv.shape
        tokens = rows if index is None else index.shape[1]
        compiled = next(w for w in WIDTHS if width <= w)
        choice = choose(backward, compiled, tokens)
        memory, tensors = Memory(), (qkv, index, lengths, out, lse, grad, dqkv)
        places = [0 if x is None else memory.add(storage(x)) for x in tensors]
        addresses = [0 if x is None else place + x.storage_offset() * x.element_size() for place, x in zip(places, tensors, strict=True)]
        wide = [x is not None and x.dtype == torch.int64 for x in (index, lengths)]
        number = list(NUMBERS).index(qkv.dtype)
        params = PARAMS.pack(*addresses, batch, rows, tokens, heads, width, scale, *wide, number, choice.warps, choice.spans)
        program, started = self._program(compiled, NUMBERS[qkv.dtype], choice), time.perf_counter()
        self.record.instructions += execute(program, (heads, batch), [params], choice.shared, memory, 32 * choice.warps)
        self.record.seconds += time.perf_counter() - started
        self.record.blocks += heads * batch
        self.record.launches[program.name] += 1
        self.record.reports += [f"{choice.kernel}: {report}" for report in memory.reports]
        for place, tensor in zip(places, tensors, strict=True):
            if tensor is not None:
                raw = storage(tensor)
                raw[:] = memory.get(place, raw)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the public operation runs in these functions."""
        with ExitStack() as stack:
            stack.enter_context(patch.object(dispatch, "resolve", lambda *_: "cuda"))
            for name in ("forward", "backward"):
                stack.enter_context(patch.object(cuda, name, getattr(self, name)))
            yield


def works(widths: tuple[int, ...], tokens: tuple[int, ...] = TOKENS) -> list[Work]:
    """Every kernel in bf16, plain and with an index and lengths, and in float16."""
    found = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for width in widths:
            for n in tokens:
                for dtype, gathered in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)):
                    arguments = {"qkv": random(1, n + 7 * gathered, 3, 1, width)}
                    if gathered:
                        arguments |= {"index": torch.rand(1, n + 7).argsort(1)[:, :n].to(torch.int32), "lengths": torch.tensor([n - 2])}
                    example = Example(attention, attention_reference.attention, arguments, ("qkv",))
                    name = f"csrc attention {NUMBERS[dtype]} d{width}{' gathered' if gathered else ''}, {n} tokens"
                    found.append(Work(name, example, dtype, ()))
    return found
