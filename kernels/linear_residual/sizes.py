"""Classes of sizes in which versions of linear_residual are checked and chosen, those of linear_gelu, and the arguments that stand for them."""

from collections.abc import Iterator

import torch

from ..linear_gelu.sizes import ROWS, shapes, size_class

__all__ = ["SIZES", "arguments", "size_class"]

SIZES = dict.fromkeys(("backward_gelu", "forward", "backward"), tuple(ROWS))


def arguments(function: str, size: str, dtype: torch.dtype, device: torch.device | str) -> Iterator[tuple]:
    """Raw arguments of a class: the second layer of the MLP; where they are not the usual ones with a layer scale and without a bias, forward as the
    projection of the attention, too."""
    for rows, m, k, usual in shapes(size):
        for inner in dict.fromkeys((k, m)) if function == "forward" and usual else (k,):
            weight = torch.randn(m, inner, device=device, dtype=dtype) * inner**-0.5
            gamma = None if usual else torch.randn(m, device=device, dtype=dtype)
            x, y = torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(rows, m, device=device, dtype=dtype)
            if function == "forward":
                yield x, weight, torch.randn(m, device=device, dtype=dtype) if usual else None, y, gamma
            else:
                yield (y, weight, gamma, x) if function == "backward_gelu" else (y, weight, gamma)
