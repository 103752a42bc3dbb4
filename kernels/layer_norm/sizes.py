"""Classes of sizes in which versions of layer_norm are checked and chosen, and the arguments that stand for them.

"d1024": rows of 513 to 1024 columns; the narrowest is "d64".
"""

from collections.abc import Iterator

import torch

from .. import versions

NARROWEST = 64
COLUMNS = {1024: 768, 256: 192, 512: 384, 64: 64, 128: 128, 2048: 1280, 4096: 4096, 8192: 8192}  # most of a class: the usual, of ViTs first
EVERY = tuple(f"d{most}" for most in COLUMNS)
SIZES = {"forward": EVERY, "backward": EVERY}


def size_class(function: str, *args) -> str:
    return f"d{max(NARROWEST, 1 << (args[0].shape[-1] - 1).bit_length())}"


def arguments(function: str, size: str, dtype: torch.dtype, device: torch.device | str) -> Iterator[tuple]:
    """Raw arguments of a class: 128 images of 47 tokens, as the engine calls them; an odd number of rows and columns, and the other options."""
    most = int(size[1:])
    for rows, d, usual in ((6016, COLUMNS.get(most, most), True), (13, most // 2 + 1, False)):
        x, other = torch.randn(2, rows, d, device=device, dtype=dtype).unbind()
        weight, bias = torch.randn(2, d, device=device, dtype=dtype).unbind()
        given = x, weight, bias if usual else None, 1e-6, None if usual else other
        if function == "backward":
            y, _, mean, rstd = versions.load("layer_norm", "reference").forward(x, weight, None, 1e-6, None)
            given = torch.randn_like(y), other if usual else None, x, weight, mean, rstd, 1e-6
        yield given
