"""Tables before they are printed: how the measurements of one kind look in them, and the forms of their cells."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .rows import Measurement

MISSING = "missing"  # a figure that a table promises and no row holds


@dataclass(frozen=True)
class Table:
    """Lines of cells under their columns. rows: of the result files, that the cells are made of. title: tells it from the others of its name."""

    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    rows: Sequence[dict] = ()
    title: str = ""


@dataclass(frozen=True)
class Layout:
    """How the measurements of one kind look. lines: the cells of a measurement, one line or several. title: what is measured."""

    title: str
    columns: tuple[str, ...]
    lines: Callable[[Measurement], list[list[str]]]

    def tables(self, measurements: Iterable[Measurement]) -> list[Table]:
        """One table for each processor whose figures no other's supersede, in the order of the measurements."""
        by_processor: dict[str, list[Measurement]] = {}
        for measurement in measurements:
            by_processor.setdefault(measurement.key[-1], []).append(measurement)
        return [self.table(mine) for mine in by_processor.values()]

    def table(self, measurements: Sequence[Measurement], title: str = "") -> Table:
        lines = [line for measurement in measurements for line in self.lines(measurement)]
        return Table(self.columns, lines, [row for measurement in measurements for row in measurement.rows], title)


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
