"""Classes of sizes in which versions of cls_attention are checked and chosen, and the arguments that stand for them.

"d64 one": heads of at most 64 elements and more than 32 (padded they are 64 wide), the CLS query alone; "few": queries of registers beside it.
"""

from collections.abc import Iterator

import torch

from .. import versions

WIDTHS = {64: 48, 32: 24, 128: 80, 16: 8}  # padded width of a head: a narrower one of the class, the usual models first
EVERY = tuple(f"d{width} {queries}" for queries in ("one", "few") for width in WIDTHS)
SIZES = {"forward": EVERY, "backward": EVERY}


def size_class(function: str, *args) -> str:
    q = args[0] if function == "forward" else args[2]
    padded = next((w for w in sorted(WIDTHS) if q.shape[-1] <= w), q.shape[-1])
    return f"d{padded} {'one' if q.shape[1] == 1 else 'few'}"


def arguments(function: str, size: str, dtype: torch.dtype, device: torch.device | str) -> Iterator[tuple]:
    """Raw arguments of a class: 128 images of DeiT-Base at 47 tokens; narrower heads at one token and at many, with a gradient of the row."""
    padded, queries = size.split()
    width = int(padded[1:])
    for tokens, d, images, heads, ranked in ((47, width, 128, 12, False), (2, WIDTHS[width], 3, 2, True), (577, WIDTHS[width], 3, 2, True)):
        q = torch.randn(images, {"one": 1, "few": 2 + 3 * ranked}[queries], heads, d, device=device, dtype=dtype)
        kv = torch.randn(images, tokens, 2, heads, d, device=device, dtype=dtype)
        given = q, kv, d**-0.5
        if function == "backward":
            out, row, weights = versions.load("cls_attention", "reference").forward(*given)
            given = torch.randn_like(out), torch.randn_like(row) if ranked else None, q, kv, weights, d**-0.5
        yield given
