"""Consoles, tables and progress bars on the terminal: by rich, and tables also as plain text where rich is not installed (bare GPU machines)."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

WIDTH = 130  # characters of a line where the stream is no terminal
BAR_EVERY = 0.2  # seconds between updates of a bar
PLAIN_EVERY = 10.0  # seconds between lines of progress where stderr is no terminal
LOG_EVERY = 0.5  # seconds between lines of a log


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; what stands for one in notebooks and loggers may not know, or not be there."""
    try:
        return bool(stream.isatty())
    except Exception:
        return False


class _Forgiving:
    """A stream that forgets what it cannot write: the other end of a terminal may be gone."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        never_failing(self.stream.write)(text)
        return len(text)

    def flush(self) -> None:
        never_failing(self.stream.flush)()

    def isatty(self) -> bool:
        return is_terminal(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def never_failing(show: Callable[..., object]) -> Callable[..., None]:
    """`show`, which is not called again once it failed: progress that cannot be written ends no run."""
    failed = False

    def call(*args: Any) -> None:
        nonlocal failed
        try:
            if not failed:
                show(*args)
        except Exception:
            failed = True

    return call


def make_console(stderr: bool = False, quiet: bool = False) -> "Console":
    """A rich console on stdout or stderr, as wide as the terminal, or WIDTH where there is none. quiet: it prints nothing."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, quiet=quiet, width=None if is_terminal(stream) else WIDTH)


def make_progress_bar() -> "Progress":
    """A bar on stderr that vanishes when it is done; its tasks take description, total, completed and the text `state`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"), TimeRemainingColumn()]
    return Progress(*columns, console=Console(file=_Forgiving(sys.stderr)), transient=True)  # type: ignore[arg-type]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, wrap: bool = False) -> None:
    """Print rows under their column names; the first column is left-aligned, the others right-aligned.

    wrap: break cells so that the table fits the console; otherwise the lines are as long as the table needs.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.measure import Measurement
        from rich.table import Table
    except ImportError:
        print(plain_table(title, columns, cells))
        return
    table = Table(title=escape(title), title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if i else "left", no_wrap=not wrap)
    for row in cells:
        table.add_row(*map(escape, row))
    console = make_console()
    if not wrap:
        unbounded = Console(width=1000)
        needed = Measurement.get(unbounded, unbounded.options, table).maximum
        console = Console(width=max(console.width, needed))
    console.print(table)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as text."""
    lines = [[column.replace("\n", " ") for column in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]) for line in lines]
    return "\n".join([title, *text])
