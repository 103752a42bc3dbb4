"""Progress of an inversion on the terminal: iteration, it/s, loss, active patches, time left."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .settings import Iteration


@contextmanager
def show_progress(
    on_iteration: Callable[[Iteration], None] | None, shown: bool = True, title: str = "inverting"
) -> Iterator[Callable[[Iteration], None]]:
    """A callback that draws the progress on stderr, where that is a terminal, and passes each `Iteration` on."""
    if not (shown and sys.stderr.isatty()):
        yield on_iteration or (lambda iteration: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[state]}"), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, state="")

        def report(at: Iteration) -> None:
            done = at.batch * at.iterations + at.iteration + 1
            rate = done / max(at.seconds, 1e-9)
            batch = f"batch {at.batch + 1}/{at.batches}  " if at.batches > 1 else ""
            state = f"{batch}{at.iteration + 1}/{at.iterations}  {rate:.1f} it/s  loss {at.loss:.3f}  {at.active} active patches"
            bar.update(task, total=at.batches * at.iterations, completed=done, state=state)
            if on_iteration is not None:
                on_iteration(at)

        yield report
