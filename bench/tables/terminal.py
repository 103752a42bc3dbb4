"""Tables on the terminal: with rich where it is installed, in plain text where it is not (GPU machines)."""

from collections.abc import Sequence


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their column names; the first column is left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in rows]
    try:
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.measure import Measurement
        from rich.table import Table
    except ImportError:
        print(plain_table(title, columns, cells))
        return
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in cells:
        table.add_row(*(escape(cell) for cell in row))
    console = Console()
    Console(width=max(console.width, Measurement.get(Console(width=1000), console.options.update(width=1000), table).maximum)).print(table)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as text."""
    rows = [columns, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    return "\n".join([title, *lines])
