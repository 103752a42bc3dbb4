"""A table before it is printed, and the forms of its cells."""

from collections.abc import Sequence
from dataclasses import dataclass

MISSING = "missing"  # a figure that a table promises and no row holds


@dataclass(frozen=True)
class Table:
    """Lines of cells under their columns. rows: of the result files, that the cells are made of. title: tells it from the others of its name."""

    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    rows: Sequence[dict] = ()
    title: str = ""


def ratio(a: float | None, b: float | None) -> str:
    """a over b, with two decimals."""
    return f"{a / b:.2f}x" if a and b else MISSING


def three_digits(value: float) -> str:
    """187, 47.7, 0.753."""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".removesuffix(".")


def per_cent(value: float | None, decimals: int = 0) -> str:
    """A fraction as per cent; nothing where it is not known."""
    return "" if value is None else f"{100 * value:.{decimals}f} %"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:.0f}"
