"""How the measurements of one kind look in a table."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .rows import Measurement
from .table import Table


@dataclass(frozen=True)
class Layout:
    """lines: the cells of a measurement, one line or several. title: what is measured, for the history."""

    title: str
    columns: tuple[str, ...]
    lines: Callable[[Measurement], list[list[str]]]

    def tables(self, measurements: Iterable[Measurement]) -> list[Table]:
        """One table for each processor whose figures no other's supersede, in the order of the measurements."""
        by_processor: dict[str, list[Measurement]] = {}
        for measurement in measurements:
            by_processor.setdefault(measurement.key[-1], []).append(measurement)
        return [self.table(mine) for mine in by_processor.values()]

    def table(self, measurements: list[Measurement], title: str = "") -> Table:
        lines = [line for measurement in measurements for line in self.lines(measurement)]
        return Table(self.columns, lines, [row for measurement in measurements for row in measurement.rows], title)
