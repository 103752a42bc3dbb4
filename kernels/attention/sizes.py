"""Classes of sizes in which versions of attention are checked and chosen, and the arguments that stand for them.

"d64 n128": heads of at most 64 elements and more than 32 (padded they are 64 wide), 65 to 128 tokens; "d64 long": more tokens than 256. The limits
are those of the tile tables.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import versions

WIDTHS = {64: 48, 32: 24, 128: 80, 16: 8}  # padded width of a head: a narrower one of the class, the usual models first
TOKENS = {64: 47, 256: 197, 32: 29, 128: 99, 192: 148, 16: 10}  # most tokens of a class: the usual ones, those of published runs first
LONG, USUAL_LONG = "long", 577
HEADS, IMAGES = 12, 128  # of DeiT-Base, at 47 tokens

EVERY = tuple(f"d{width} {tokens}" for width in WIDTHS for tokens in (*(f"n{most}" for most in TOKENS), LONG))
SIZES = {"forward": EVERY, "backward": EVERY}


def size_class(function: str, *args) -> str:
    qkv, index = args[:2] if function == "forward" else args[1:3]
    n, width = (qkv if index is None else index).shape[1], qkv.shape[-1]
    padded = next((w for w in sorted(WIDTHS) if width <= w), width)
    return f"d{padded} " + next((f"n{most}" for most in sorted(TOKENS) if n <= most), LONG)


def arguments(function: str, size: str, dtype: torch.dtype, device: torch.device | str) -> Iterator[tuple]:
    """Raw arguments of a class: the usual ones; narrower heads at the fewest tokens; rows of a longer buffer, some past a length, at the most."""
    padded, tokens = size.split()
    width = int(padded[1:])
    most = max(TOKENS) + 65 if tokens == LONG else int(tokens[1:])
    fewest = max((other + 1 for other in TOKENS if other < most), default=2)
    usual = USUAL_LONG if tokens == LONG else TOKENS[most]
    for n, d, images, heads, gathered in (
        (usual, width, max(1, IMAGES * 47 // max(usual, 47)), HEADS, False),
        (fewest, WIDTHS[width], 3, 3, False),
        (most, width, 3, 2, True),
    ):
        rows = n + 5 * gathered
        qkv = torch.randn(images, rows, 3, heads, d, device=device, dtype=dtype)
        index = torch.rand(images, rows, device=device).argsort(1)[:, :n].int() if gathered else None
        lengths = torch.tensor([n, n - 1, (n + 1) // 2], device=device, dtype=torch.int32) if gathered else None
        given = qkv, index, lengths, d**-0.5
        if function == "backward":
            out, lse = versions.load("attention", "reference").forward(*given)
            given = torch.randn_like(out), qkv, index, lengths, out, lse, d**-0.5
        yield given


def comparable(function: str, args: tuple, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`results` without lse of rows past a length, which nobody reads."""
    if function != "forward" or args[2] is None:
        return results
    out, lse = results
    return out, lse.masked_fill(torch.arange(lse.shape[-1], device=lse.device) >= args[2][:, None, None], 0)
