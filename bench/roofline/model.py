"""The time of a kernel on an H200 as it may be expected, from its compiled code, its launch and a few constants. Not measured.

A program uses four units of its multiprocessor: tensor cores, issue slots, and its share of the bandwidths of L2 and memory. In a loop that
prefetches its operands (two stages or more) uses overlap; what comes after, the epilogue, waits for the loop. Programs that reside together overlap
until one unit is busy all the time. So R programs on a multiprocessor take

    max(R * longest use, latency + loop + epilogue)

A kernel has programs / (132 R) such rounds, the last with fewer programs. It takes at least latency + bytes / bandwidth, and a launch.

PyTorch's GEMMs are taken as cuBLAS gives them: loads, tensor cores and epilogue overlap, pairs of tiles share an operand. What remains is the number
of tiles on the busiest multiprocessor, and the first load and the last store.
"""

from dataclasses import dataclass
from typing import NamedTuple

from .compiled_code import Code
from .compiled_code import of as code_of
from .recording import Launch, Operation
from .work import Work, work_of


@dataclass(frozen=True)
class Constants:
    """Of one device. Rates are per second."""

    flops: float  # bf16 on the tensor cores
    bandwidth: float  # bytes from and to memory
    l2: float  # bytes from L2
    processors: int
    issue: float  # instructions of a warp, per multiprocessor
    latency: float  # seconds from a load to its use
    launch: float  # seconds at least from one kernel of a graph to the next
    registers: int = 65536  # per multiprocessor
    shared: int = 233472  # bytes per multiprocessor, 1 KiB of each program reserved
    warps: int = 64
    programs: int = 32


# 790 TFLOP/s and 4.3 TB/s: measured on an H200 (a GEMM of 8192 x 8192 x 8192 on random bf16 data; a copy, bytes read and written). 132
# multiprocessors, registers, shared memory, warps and programs: CUDA's documentation for compute capability 9.0. The rest is assumed: 5120 bytes of
# L2 a cycle and 4 instructions a cycle and multiprocessor, at 1.755 GHz; 1 us for a load from memory under load; 2 us for a kernel in a graph.
CLOCK = 1.755e9
H200 = Constants(790e12, 4.3e12, 5120 * CLOCK, 132, 4 * CLOCK, 1.0e-6, 2.0e-6)
CUBLAS_TILES = ((128, 256), (256, 128), (128, 192), (128, 128), (64, 128))
CUBLAS_SPLITS = (1, 2, 4, 8)  # parts of the contraction, where tiles are few


class Estimate(NamedTuple):
    """Seconds, and what they follow from. bound: "FLOPs", "instructions", "bytes", "latency" or "launch", what rules."""

    name: str
    seconds: float
    bound: str
    flops: float
    bytes: int
    programs: int = 0
    resident: int = 0  # programs per multiprocessor
    rounds: float = 0.0
    code: Code | None = None
    tile: str = ""


def estimate(kernel: Launch | Operation, on: Constants = H200) -> Estimate:
    """Time of one kernel of a recorded step."""
    return _of_launch(kernel, on) if isinstance(kernel, Launch) else _of_operation(kernel, on)


def resident(code: Code, on: Constants = H200) -> int:
    """Programs that a multiprocessor holds at a time."""
    registers = -(-code.registers // 8) * 8 * 32 * code.warps
    return min(on.registers // registers, on.shared // (code.shared + 1024), on.warps // code.warps, on.programs)


def _of_launch(launch: Launch, on: Constants) -> Estimate:
    work, code = work_of(launch), code_of(launch.compiled)
    together = max(1, resident(code, on))
    uses = _uses(launch, work, code, on)
    alone = on.latency + _alone(launch, work, code, uses, on)
    longest = max(uses.values())
    whole, rest = divmod(launch.programs, on.processors * together)
    last = -(-rest // on.processors)
    busy = whole * max(together * longest, alone) + (max(last * longest, alone) if rest else 0.0)
    found = {"launch": on.launch, "bytes": on.latency + work.bytes / on.bandwidth, "busy": busy}
    rules = max(found, key=found.__getitem__)
    if rules == "busy":
        rules = "waiting" if alone > (together if whole else last) * longest else max(uses, key=uses.__getitem__)
    rounds = launch.programs / (on.processors * together)
    return Estimate(launch.name, max(found.values()), rules, work.flops, work.bytes, launch.programs, together, rounds, code, _tile(launch))


def _uses(launch: Launch, work: Work, code: Code, on: Constants) -> dict[str, float]:
    """Seconds for which one program needs each unit of its multiprocessor."""
    return {
        "FLOPs": work.executed / launch.programs / (on.flops / on.processors),
        "instructions": (code.instructions + (work.rounds - 1) * code.loop) * code.warps / on.issue,
        "L2": work.streamed / launch.programs / (on.l2 / on.processors),
        "bytes": work.bytes / launch.programs / (on.bandwidth / on.processors),
    }


def _alone(launch: Launch, work: Work, code: Code, uses: dict[str, float], on: Constants) -> float:
    """Seconds of one program alone on its multiprocessor, after its first load."""
    if not work.streamed:
        return uses["FLOPs"] + uses["instructions"] + uses["bytes"]
    in_loop = work.rounds * code.loop * code.warps / on.issue
    beside = uses["instructions"] - in_loop + work.beside / launch.programs / (on.bandwidth / on.processors)
    if launch.options.get("num_stages", 3) < 2:
        return uses["FLOPs"] + in_loop + uses["L2"] + (work.rounds - 1) * on.latency + beside
    return max(uses["FLOPs"], in_loop, uses["L2"]) + beside


def _tile(launch: Launch) -> str:
    sizes = [str(launch.arguments[name]) for name in ("BM", "BT", "BN", "BS", "BD", "BK", "BR") if name in launch.arguments]
    return "x".join(sizes)


def _of_operation(operation: Operation, on: Constants) -> Estimate:
    found = {"launch": on.launch, "bytes": on.latency + operation.bytes / on.bandwidth, "FLOPs": gemm_seconds(operation, on)}
    rules = max(found, key=found.__getitem__)
    return Estimate(operation.name, found[rules], rules, operation.flops, operation.bytes)


def gemm_seconds(operation: Operation, on: Constants = H200) -> float:
    """Time of PyTorch's GEMM in the tile that suits it best."""
    if not operation.sizes:
        return operation.flops / on.flops
    return min(_tiled(*operation.sizes, *tile, split, on) for tile in CUBLAS_TILES for split in CUBLAS_SPLITS)


def _tiled(M: int, N: int, K: int, BM: int, BN: int, split: int, on: Constants) -> float:
    """Time of a GEMM in tiles of BM x BN, its contraction in `split` parts whose sums are added in memory."""
    tiles = -(-M // BM) * -(-N // BN) * split
    streamed = (BM + BN - max(BM, BN) / 2) * K / split * 2
    tile = max(2.0 * BM * BN * K / split / (on.flops / on.processors), streamed / (on.l2 / on.processors))
    store = BM * BN * (2 if split == 1 else 8) / (on.bandwidth / on.processors)
    return on.latency + -(-tiles // on.processors) * tile + store + (split > 1) * on.launch
