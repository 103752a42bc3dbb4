"""What `bench.tune` times, as data: the slots of the tile tables, the arguments that ask for them, the values that their numbers may take."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

import torch

from smi.inversion.schedules import DIVISION, PUBLISHED_ITERATIONS, make_schedule
from smi.kernels import tuned, versions
from smi.kernels.attention import tiles

BATCH, HEADS, IMAGE, PATCH = 128, 12, 224, 16  # images as in the benchmark cases
WIDTHS = (768, 192, 384)  # tokens of DeiT-Base, -Tiny and -Small; MLPs are four times as wide
RUNS = (("smi", None, 128), ("dense", None, 128), ("pri", DIVISION, 18))  # the published runs: method, division, trajectories at once
TOKENS = (29, 47, 99, 148, 197, 577)  # the sequences of SMI, PRI and dense inversion at 224, and a dense one at 384
ROWS = (47, 197)  # tokens of an image in layer_norm and cls_attention
ATTENTION = ((64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32))  # head widths: the usual one, and 72, 80, 128, which are padded to 128
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Slot:
    """operation, name: what the launcher asks for (kernels/tuned.py). function: the raw function that launches the kernel. arguments: its raw
    arguments on a device; the first are timed, all are checked. axes: values of every number of the tile by name, in order, none where it is fixed.
    written: places of the arguments that are written. defined: arguments, results -> what of the results is defined and thus compared."""

    operation: str
    name: str
    function: str
    arguments: Callable[[torch.device], list[tuple]]
    axes: dict[str, tuple[int, ...]]
    written: tuple[int, ...] = ()
    defined: Callable[[tuple, tuple], tuple] = lambda args, results: results


def powers(low: int, high: int) -> tuple[int, ...]:
    return tuple(p for p in POWERS if low <= p <= high)


def draw(device, dtype, *shape, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=dtype) * scale


def reference(operation: str, function: str, *args):
    return getattr(versions.load(operation, "reference"), function)(*args)


# ---- rows: layer_norm, linear_gelu, linear_residual


def norm_slots() -> Iterator[Slot]:
    narrowest = min(versions.load("layer_norm", "triton").TILES)
    for width in WIDTHS:
        BD = max(narrowest, 1 << (width - 1).bit_length())

        def forward(device, width=width):
            x, residual = draw(device, torch.bfloat16, 2, BATCH * ROWS[0], width).unbind()
            weight, bias = draw(device, torch.bfloat16, 2, width).unbind()
            return [(x, weight, bias, 1e-6, residual)]

        def backward(device, forward=forward):
            ((x, weight, bias, eps, residual),) = forward(device)
            _, s, mean, rstd = reference("layer_norm", "forward", x, weight, bias, eps, residual)
            return [(torch.randn_like(x), torch.randn_like(x), s, weight, mean, rstd, eps)]

        axes = {"BR": powers(1, 32), "warps": powers(1, 16)}
        yield Slot("layer_norm", f"fwd/d{BD}/2", "forward", forward, axes)
        yield Slot("layer_norm", f"bwd/d{BD}/2", "backward", backward, axes)


@cache
def gemm_rows() -> tuple[int, ...]:
    """Rows of the GEMMs in the published runs: of every bin that a launcher tells apart, a power of two, those of most iterations; the bins of most
    iterations first. Then those of the last block, where the heads read one token of each image."""
    count: Counter = Counter()
    for method, division, batch in RUNS:
        options = {} if division is None else {"division": division}
        for stage in make_schedule(method, (IMAGE // PATCH) ** 2, PUBLISHED_ITERATIONS, **options).stages():
            count[batch * (1 + stage.active)] += stage.stop - stage.start
    bins: dict[int, list[int]] = {}
    for rows, _ in count.most_common():
        bins.setdefault(bin_of(rows), []).append(rows)
    return (*(rows[0] for rows in bins.values()), *dict.fromkeys(batch for *_, batch in RUNS))


def bin_of(rows: int) -> int:
    return 1 << (rows - 1).bit_length()


GEMM = {"BM": powers(32, 256), "BN": powers(32, 256), "BK": powers(32, 128), "warps": powers(4, 8), "stages": (1, 2, 3, 4, 5)}
GEMM |= {"maxnreg": (0, 128, 168), "resident": ()}  # the latter follows from the others, and only the launcher's own choice reads it


def gemm_slot(operation: str, kernel: str, function: str, N: int, K: int, rows: int, arguments: Callable) -> Slot:
    """A GEMM with result [rows, N] and inner dimension K. arguments: device, rows -> raw arguments."""
    name = f"{kernel}/{N}x{K}/m{bin_of(rows)}/2"
    return Slot(operation, name, function, lambda device: [arguments(device, rows)], GEMM)


def gelu_slots() -> Iterator[Slot]:
    for width, rows in ((w, r) for w in WIDTHS for r in gemm_rows()):
        hidden = 4 * width

        def forward(device, rows, width=width, hidden=hidden):
            weight = draw(device, torch.bfloat16, hidden, width, scale=width**-0.5)
            return draw(device, torch.bfloat16, rows, width), weight, draw(device, torch.bfloat16, hidden), "gelu", True

        def backward(device, rows, width=width, hidden=hidden):
            weight = draw(device, torch.bfloat16, hidden, width, scale=width**-0.5)
            grad, slope = draw(device, torch.bfloat16, 2, rows, hidden).unbind()
            return grad, slope, weight

        yield gemm_slot("linear_gelu", "fwd", "forward", hidden, width, rows, forward)
        yield gemm_slot("linear_gelu", "bwd", "backward", width, hidden, rows, backward)


def residual_slots() -> Iterator[Slot]:
    for width, rows in ((w, r) for w in WIDTHS for r in gemm_rows()):
        for inner in (width, 4 * width):  # the attention's projection, the MLP's second layer

            def forward(device, rows, width=width, inner=inner):
                weight, bias = draw(device, torch.bfloat16, width, inner, scale=inner**-0.5), draw(device, torch.bfloat16, width)
                return draw(device, torch.bfloat16, rows, inner), weight, bias, draw(device, torch.bfloat16, rows, width), None

            yield gemm_slot("linear_residual", "fwd", "forward", width, inner, rows, forward)

        def backward(device, rows, width=width):
            weight = draw(device, torch.bfloat16, width, 4 * width, scale=(4 * width) ** -0.5)
            return draw(device, torch.bfloat16, rows, width), weight, None, draw(device, torch.bfloat16, rows, 4 * width)

        yield gemm_slot("linear_residual", "bwd_gelu", "backward_gelu", 4 * width, width, rows, backward)


# ---- attention, cls_attention


def attention_arguments(n: int, width: int, dtype: torch.dtype, gathered: bool) -> Callable[[torch.device], tuple]:
    """Forward's raw arguments; fewer images the longer they are."""

    def make(device: torch.device) -> tuple:
        batch = max(1, BATCH * 47 // max(n, 47))
        qkv = draw(device, dtype, batch, n, 3, HEADS, width)
        index = torch.rand(batch, n, device=device).argsort(1).int() if gathered else None
        lengths = torch.randint(1, n + 1, (batch,), device=device).int() if gathered else None
        if gathered:
            lengths[-1] = n
        return qkv, index, lengths, width**-0.5

    return make


def forward_and_backward(counts: tuple[int, ...], width: int, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Arguments of both functions: the first count of tokens plain, to be timed; every count with index and lengths, too, to be checked."""

    def forward(device):
        every = [(counts[0], False), *((n, True) for n in counts)]
        return [attention_arguments(n, width, dtype, gathered)(device) for n, gathered in every]

    def backward(device):
        given = forward(device)
        kept = [reference("attention", "forward", *args) for args in given]
        return [(torch.randn_like(out), *args[:3], out, lse, args[3]) for args, (out, lse) in zip(given, kept, strict=True)]

    return forward, backward


def real_rows(args: tuple, results: tuple) -> tuple:
    """out, and lse [B, H, n] of the tokens that are real."""
    out, lse = results
    lengths = args[2]
    if lengths is None:
        return results
    past = torch.arange(lse.shape[-1], device=lse.device) >= lengths[:, None, None]
    return out, lse.masked_fill(past, 0)


def typical(low: int, high: int) -> tuple[int, ...]:
    """Counts of tokens of a class low to high: the usual one first, then the ends; not one token, whose error must be zero."""
    low = max(low, 2)
    usual = next((n for n in TOKENS if low <= n <= high), high)
    return tuple(dict.fromkeys((usual, low, high)))


def classes(entries: tuple, architecture: int, longest: int) -> Iterator[tuple[int, int, str]]:
    """Shortest and longest sequence of every entry that an architecture uses, and its name. An entry without end is split at powers of two."""
    low = 1
    for entry in (e for e in entries if tiles.first(entries, e.n, architecture) is e):
        while low <= min(entry.n, longest):
            most = entry.n if entry.n < tiles.ANY else 1 << (low - 1).bit_length()
            yield low, min(most, longest), f"n{most}"
            low = most + 1


def attention_slots(device: torch.device) -> Iterator[Slot]:
    architecture, longest = tuned.limits(device).code, max(TOKENS)
    axes = {"BT": powers(16, 128), "BS": powers(16, 128), "BE": (), "warps": powers(1, 8), "stages": (1, 2, 3, 4)}
    one_pass = axes | {"BS": ()}  # all keys of a head: given by the class
    for width, dtype in ATTENTION:
        key, label = (width, dtype.itemsize), f"d{width}/{dtype.itemsize}"
        for low, high, name in classes(tiles.FORWARD[key], architecture, longest):
            forward, _ = forward_and_backward(typical(low, high), width, dtype)
            yield Slot("attention", f"fwd-{name}/{label}", "forward", forward, axes, defined=real_rows)
        covered = 0
        for low, covered, name in classes(tiles.BACKWARD[key], architecture, longest):
            _, backward = forward_and_backward(typical(low, covered), width, dtype)
            yield Slot("attention", f"bwd-{name}/{label}", "backward", backward, one_pass)
        if covered < longest:
            _, backward = forward_and_backward((longest,), width, dtype)
            for kernel in ("bwd-queries", "bwd-keys"):
                yield Slot("attention", f"{kernel}/{label}", "backward", backward, axes)


def cls_slots() -> Iterator[Slot]:
    for width, (queries, label) in ((w, q) for w in (64, 128) for q in ((1, "one"), (5, "few"))):

        def forward(device, width=width, queries=queries):
            q = draw(device, torch.bfloat16, BATCH, queries, HEADS, width)
            return [(q, draw(device, torch.bfloat16, BATCH, tokens, 2, HEADS, width), width**-0.5) for tokens in ROWS]

        def backward(device, forward=forward):
            given = forward(device)
            kept = [reference("cls_attention", "forward", *args) for args in given]
            return [(torch.randn_like(out), torch.randn_like(row), *args[:2], w, args[2]) for args, (out, row, w) in zip(given, kept, strict=True)]

        axes = {"BT": powers(16, 256), "warps": powers(1, 16)}
        yield Slot("cls_attention", f"fwd/d{width}/2/{label}", "forward", forward, axes)
        yield Slot("cls_attention", f"bwd/d{width}/2/{label}", "backward", backward, axes)


# ---- images: patch_embed, image_step


def active(device: torch.device, batch: int, n: int) -> torch.Tensor:
    """n distinct patches of each image, int32 [batch, n]."""
    return torch.rand(batch, (IMAGE // PATCH) ** 2, device=device).argsort(1)[:, :n].int()


def embed_slots() -> Iterator[Slot]:
    kernel = versions.load("patch_embed", "triton")
    width, n, K = max(WIDTHS), max(1, (IMAGE // PATCH) ** 2 // 4), 3 * PATCH**2
    axes = {"BT": powers(32, 256), "BD": powers(32, 256), "BK": powers(16, 128), "warps": powers(4, 8), "stages": (1, 2, 3, 4, 5)}
    for batch, dtype in ((BATCH, torch.bfloat16), (max(1, BATCH // 8), torch.bfloat16), (BATCH, torch.float32)):

        def forward(device, batch=batch, dtype=dtype):
            index, weight = active(device, batch, n), draw(device, dtype, width, K, scale=K**-0.5)
            tables = draw(device, dtype, width), draw(device, dtype, (IMAGE // PATCH) ** 2, width), draw(device, dtype, 1, width)
            moved = torch.tensor([-13, 22, 1], device=device, dtype=torch.int32)
            return [(draw(device, dtype, batch, 3, IMAGE, IMAGE), index, weight, *tables, moved, PATCH)]

        def backward(device, forward=forward, batch=batch, dtype=dtype):
            ((_, index, weight, _, _, _, moved, _),) = forward(device)
            return [(draw(device, dtype, batch, 1 + n, width), index, weight, moved, PATCH, 1, IMAGE, IMAGE, dtype)]

        def name(elements: int, dtype=dtype) -> str:
            return "float32" if dtype == torch.float32 else "large" if elements >= kernel.LARGE_FROM else "small"

        yield Slot("patch_embed", f"fwd/{name(batch * (1 + n) * width)}", "forward", forward, axes)
        yield Slot("patch_embed", f"bwd/{name(batch * n * K)}", "backward", backward, axes)


def step_slots() -> Iterator[Slot]:
    def step(device, n: int | None):
        images, grad, average = draw(device, torch.float32, 3, BATCH, 3, IMAGE, IMAGE).unbind()
        low, high = torch.full((3,), -2.0, device=device), torch.full((3,), 2.0, device=device)
        norms, count = reference("image_step", "tv_norms", images), torch.tensor(100, device=device, dtype=torch.int32)
        index = None if n is None else active(device, BATCH, n)
        return [(images, grad, average, grad.square(), count, low, high, index, PATCH, norms, 1e-4, 0.25, 0.5, 0.99, 1e-8, None)]

    def pull(device):
        images = draw(device, torch.float32, BATCH, 3, IMAGE, IMAGE)
        return [(images, reference("image_step", "tv_norms", images), draw(device, torch.float32, 4))]

    few = max(1, (IMAGE // PATCH) ** 2 // 4)
    strip = {"BR": powers(1, 128), "BE": powers(16, 256), "warps": powers(1, 8)}
    patches = {"ELEMENTS": (256, 512, 1024, 2048, 4096), "warps": powers(1, 8)}
    yield Slot("image_step", f"adam/p{PATCH}", "forward", lambda device: step(device, few), patches, written=(0, 2, 3))
    yield Slot("image_step", "adam/all", "forward", lambda device: step(device, None), strip, written=(0, 2, 3))
    yield Slot("image_step", "tv_norms_bwd/all", "tv_norms_backward", pull, strip)


def chosen(every: list[Slot], patterns: list[str] | None) -> list[Slot]:
    """The slots whose "operation/name" one of the patterns matches; all without patterns. Raises ValueError for a pattern that matches none."""
    for pattern in patterns or ():
        if not any(fnmatchcase(f"{slot.operation}/{slot.name}", pattern) for slot in every):
            raise ValueError(f"no slot is called {pattern}: for example {', '.join(f'{slot.operation}/{slot.name}' for slot in every[:3])}")
    return [slot for slot in every if not patterns or any(fnmatchcase(f"{slot.operation}/{slot.name}", pattern) for pattern in patterns)]


def slots(device: torch.device, only: list[str] | None = None) -> list[Slot]:
    """Every slot, once, of some operations, of all without a choice."""
    every = [*norm_slots(), *gelu_slots(), *residual_slots(), *attention_slots(device), *cls_slots(), *embed_slots(), *step_slots()]
    return list({(slot.operation, slot.name): slot for slot in every if not only or slot.operation in only}.values())
