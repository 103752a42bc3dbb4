"""Intervals of accuracies on the same test images, and paired tests between rows.

Test images are the sample: what an image counts is the fraction of the seeds in which it is recognised.
"""

from collections.abc import Sequence
from math import erfc, sqrt

import torch
from torch import Tensor

NORMAL = 1.96  # quantile of a two-sided 95 % interval


def to_hex(right: Tensor) -> str:
    """bool [N] as N bits in hexadecimal digits, the first image in the lowest bit of the first digit."""
    bits = torch.nn.functional.pad(right.to(torch.int64), (0, -len(right) % 4)).view(-1, 4)
    return "".join(f"{int(digit):x}" for digit in bits @ torch.tensor([1, 2, 4, 8]))


def from_hex(digits: str) -> Tensor:
    """The bits float64 [N], N rounded up to a multiple of four."""
    return torch.tensor([int(digit, 16) >> bit & 1 for digit in digits for bit in range(4)], dtype=torch.float64)


def interval(right: Sequence[str], count: int) -> float:
    """Half the width of the 95 % interval of an accuracy over `count` images."""
    return NORMAL * _error(_mean(right, count))


def paired(right: Sequence[str], others: Sequence[str], count: int) -> tuple[float, float, float]:
    """Accuracy minus that of another row, half the width of its 95 % interval, and the p-value of no difference (normal, two-sided)."""
    difference = _mean(right, count) - _mean(others, count)
    mean, error = difference.mean().item(), _error(difference)
    return mean, NORMAL * error, erfc(abs(mean) / error / sqrt(2)) if error else float(mean == 0)


def _mean(right: Sequence[str], count: int) -> Tensor:
    return torch.stack([from_hex(digits)[:count] for digits in right]).mean(0)


def _error(values: Tensor) -> float:
    """One standard error of the mean."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0
