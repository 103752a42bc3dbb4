"""Classes of sizes in which versions of the linear operations are checked and chosen, and the arguments that stand for linear_gelu.

"rows 512": at most 512 rows of x, as in the last block, whose heads read one token of each image; "rows 4096": more, as in the later stages of PRI;
"rows more": more than these.
"""

from collections.abc import Iterator

import torch

ROWS = {"rows more": 6016, "rows 512": 128, "rows 4096": 2088}  # the usual: 128 images of 47 tokens, of one, 72 of 29
MOST = {"rows 512": 512, "rows 4096": 4096, "rows more": 25216}  # checked, too; all that follow are of the last class
WIDE, NARROW = (768, 3072), (200, 331)  # width of the model and of its MLP: DeiT-Base's; neither a multiple of a tile
SIZES = {"forward": tuple(ROWS), "backward": tuple(ROWS)}  # the engine takes linear_residual's backward_gelu instead of the latter


def class_of_rows(rows: int) -> str:
    return next((size for size, most in MOST.items() if rows <= most), "rows more")


def size_class(function: str, *args) -> str:
    x = args[0]
    return class_of_rows(x.numel() // max(1, x.shape[-1]))


def shapes(size: str) -> Iterator[tuple[int, int, int, bool]]:
    """Rows, widths of model and MLP, and whether they are the usual ones: to be timed; at the class's end; other widths."""
    yield ROWS[size], *WIDE, True
    yield MOST[size], *WIDE, False
    yield max((most + 1 for most in MOST.values() if most < ROWS[size]), default=3), *NARROW, False


def arguments(function: str, size: str, dtype: torch.dtype, device: torch.device | str) -> Iterator[tuple]:
    """Raw arguments of a class."""
    for rows, k, m, usual in shapes(size):
        weight = torch.randn(m, k, device=device, dtype=dtype) * k**-0.5
        if function == "backward":
            grad, slope = torch.randn(2, rows, m, device=device, dtype=dtype).unbind()
            yield grad, slope, weight
        else:
            bias = torch.randn(m, device=device, dtype=dtype) if usual else None
            yield torch.randn(rows, k, device=device, dtype=dtype), weight, bias, "gelu", True
