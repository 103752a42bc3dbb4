"""What a kernel has to do, from the arguments of its launch: FLOPs, bytes, and how often its loop runs."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from .recording import Launch, TensorFacts


class Work(NamedTuple):
    """flops: of the definition; executed: by the tensor cores, whole tiles; bytes: each element read or written once; rounds: of the loop.

    Of a GEMM whose loop prefetches its operands: streamed, what all programs read in the loop; beside: the bytes that are moved outside of it.
    """

    flops: float
    executed: float
    bytes: int
    rounds: int
    streamed: float = 0.0
    beside: int = 0


READ_AND_WRITTEN = {"adam_step": ("p_avg", "p_avg_sq")}  # arguments that count twice
OPERANDS = {  # of the GEMM in the loop
    "linear_gelu_fwd": ("p_x", "p_w"),
    "linear_gelu_bwd": ("p_dy", "p_slope", "p_w"),
    "linear_residual_fwd": ("p_x", "p_w"),
    "linear_residual_bwd_gelu": ("p_dy", "p_w"),
    "patch_embed_fwd": ("p_images", "p_weight"),
    "patch_embed_bwd": ("p_dtokens", "p_weight"),
}
OF_ACTIVE_PIXELS = {  # arguments of which only the active patches are touched
    "patch_embed_fwd": ("p_images",),
    "adam_step": ("p_images", "p_grad", "p_avg", "p_avg_sq", "p_out"),
    "copy_pixels": ("p_from", "p_to"),
}


def work_of(launch: Launch) -> Work:
    """Of a launch; raises KeyError for a kernel that is not known here."""
    a = launch.arguments
    flops, executed, rounds = FORMULAS[launch.name](launch, a)
    found = Work(flops, executed, moved_bytes(launch), rounds)
    operands = OPERANDS.get(launch.name)
    if not operands:
        return found
    rows, columns, step = (a[x] for x in ("BM", "BN", "BK")) if "BM" in a else (a["BT"], *_embed_tile(launch.name, a))
    left = rows * sum(a[name].dtype.itemsize for name in operands[:-1])
    streamed = launch.programs * rounds * step * (left + columns * a[operands[-1]].dtype.itemsize)
    return found._replace(streamed=streamed, beside=moved_bytes(launch, without=operands))


def _embed_tile(name: str, a: dict[str, Any]) -> tuple[int, int]:
    """Columns of the result and step of the contraction."""
    return (a["BD"], a["BK"]) if name.endswith("fwd") else (a["BK"], a["BD"])


def moved_bytes(launch: Launch, without: tuple[str, ...] = ()) -> int:
    """Bytes of the tensors that a kernel is given, each storage once, some arguments left out."""
    a = launch.arguments
    left_out = {a[name].storage for name in without}
    storages: dict[int, int] = {}
    for name, value in a.items():
        if isinstance(value, TensorFacts) and value.storage not in left_out:
            part = active_part(launch) if name in OF_ACTIVE_PIXELS.get(launch.name, ()) else 1.0
            times = 1 + (name in READ_AND_WRITTEN.get(launch.name, ()))
            storages[value.storage] = max(storages.get(value.storage, 0), round(times * part * value.nbytes))
    return sum(storages.values())


def active_part(launch: Launch) -> float:
    """Fraction of an image's pixels that belong to active patches."""
    a = launch.arguments
    whole = launch.name != "patch_embed_fwd" and not a["USE_INDEX"]
    return 1.0 if whole else a["n"] * a["PATCH"] ** 2 / (a["HEIGHT"] * a["WIDTH"])


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _gemm(launch: Launch, a: dict[str, Any]) -> tuple[float, float, int]:
    rounds = _cdiv(a["K"], a["BK"])
    return 2.0 * a["M"] * a["N"] * a["K"], 2.0 * launch.programs * a["BM"] * a["BN"] * a["BK"] * rounds, rounds


def _embed(launch: Launch, a: dict[str, Any]) -> tuple[float, float, int]:
    pixels = a["CHANNELS"] * a["PATCH"] ** 2
    forward = launch.name.endswith("fwd")
    rounds = _cdiv(pixels, a["BK"]) if forward else _cdiv(a["d"], a["BD"])
    return 2.0 * a["batch"] * a["n"] * a["d"] * pixels, 2.0 * launch.programs * a["BT"] * a["BD"] * a["BK"] * rounds, rounds


def _attention(gemms: int, rows: Callable[[dict], int], rounds: Callable[[dict], int]) -> Callable:
    """gemms: of n x n x D, of the definition and of the kernel; rows: keys (queries, for attention_bwd_keys) a round."""

    def formula(launch: Launch, a: dict[str, Any]) -> tuple[float, float, int]:
        batch, count, n = a["p_qkv"].shape[0], rounds(a), a["n"]
        tile = 2.0 * gemms * a["BT"] * rows(a) * a["BD"]
        return 2.0 * gemms * batch * a["H"] * n * n * a["D"], launch.programs * count * tile, count

    return formula


def _no_gemm(rounds: Callable[[dict], int] = lambda a: 1) -> Callable:
    return lambda launch, a: (0.0, 0.0, rounds(a))


def _tokens(a: dict[str, Any]) -> int:
    return 1 if a["ONE_TILE"] else _cdiv(a["T"], a["BT"])


def _tv(launch: Launch, a: dict[str, Any]) -> tuple[float, float, int]:
    return 0.0, 0.0, _cdiv(_cdiv(a["rows"], a["BR"]) * _cdiv(a["WIDTH"], a["BE"]), prod(launch.grid))


FORMULAS: dict[str, Callable] = {
    "linear_gelu_fwd": _gemm,
    "linear_gelu_bwd": _gemm,
    "linear_residual_fwd": _gemm,
    "linear_residual_bwd_gelu": _gemm,
    "patch_embed_fwd": _embed,
    "patch_embed_bwd": _embed,
    "attention_fwd": _attention(2, lambda a: a["BS"], lambda a: 1 if a["ONE_TILE"] else _cdiv(a["n"], a["BS"])),
    "attention_bwd": _attention(5, lambda a: (a["NS"] - 1) * a["BS"] + a["BE"], lambda a: 1 if a["ONE_TILE"] else _cdiv(a["n"], a["BT"])),
    "attention_bwd_queries": _attention(3, lambda a: a["BS"], lambda a: _cdiv(a["n"], a["BS"])),
    "attention_bwd_keys": _attention(4, lambda a: a["BS"], lambda a: _cdiv(a["n"], a["BT"])),
    "cls_attention_fwd": _no_gemm(_tokens),
    "cls_attention_bwd": _no_gemm(_tokens),
    "cls_attention_row": _no_gemm(),
    "layer_norm_fwd": _no_gemm(),
    "layer_norm_bwd": _no_gemm(),
    "adam_step": _no_gemm(),
    "copy_pixels": _no_gemm(),
    "tv_sums": _tv,
    "tv_roots": _no_gemm(),
    "tv_norms_bwd": _no_gemm(),
}
