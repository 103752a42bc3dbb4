"""Progress of an inversion on the terminal: iteration, it/s, loss, active patches, time left."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..console import BAR_EVERY, LOG_EVERY, PLAIN_EVERY, is_terminal, make_progress_bar, never_failing
from ..errors import InputError


@dataclass(frozen=True, eq=False)
class Iteration:
    """What `on_iteration` is told after each update."""

    batch: int  # 0-based
    batches: int
    iteration: int  # 0-based, of this batch
    iterations: int
    value: float | Tensor  # the loss; reading it as `loss` waits for the device
    active: int  # patches of each image that took part
    seconds: float  # since the run began
    images: Tensor  # [B, C, H, W], normalised pixels, live: clone to keep
    index: Tensor  # int64 [B, active]
    labels: Tensor  # int64 [B]
    made: int | None = None  # updates since then; None: all up to this one

    @property
    def loss(self) -> float:
        return float(self.value)


Report = Callable[[Iteration], None]


@contextmanager
def show_progress(on_iteration: Report | None, title: str, shown: bool = True) -> Iterator[Report]:
    """A callback that shows the progress on stderr, a bar on a terminal and a line now and then elsewhere, and passes each `Iteration` on."""
    with _bar(title) if shown and is_terminal(sys.stderr) else _lines(title, shown) as showing:
        show = never_failing(showing)

        def report(at: Iteration) -> None:
            show(at)
            if on_iteration is not None:
                on_iteration(at)

        yield report


@contextmanager
def log_to(path: Path | None) -> Iterator[Report | None]:
    """A callback that appends JSON lines to a file: time, batch, iteration, loss, active patches and it/s, now and then and at the end of each batch;
    None for None. A loss that is not finite is null. Raises InputError where the file cannot be opened; a disk that fills later ends no run."""
    if path is None:
        yield None
        return
    try:
        file = path.open("a")
    except OSError as error:
        raise InputError(f"the log {path} cannot be written ({error.strerror or error})") from error

    def write(at: Iteration) -> None:
        line = {name: getattr(at, name) for name in ("batch", "batches", "iteration", "iterations", "loss", "active")}
        line["loss"] = line["loss"] if math.isfinite(line["loss"]) else None  # JSON has no NaN
        when = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "its_per_second": _rate(at)}
        file.write(json.dumps({**when, **line}) + "\n")
        file.flush()

    every, last = _now_and_then(LOG_EVERY, never_failing(write)), never_failing(write)
    try:
        yield lambda at: last(at) if at.iteration + 1 == at.iterations else every(at)
    finally:
        with suppress(OSError):  # of the log alone: the run's own errors are the caller's
            file.close()


def _state(at: Iteration) -> str:
    batch = f"batch {at.batch + 1}/{at.batches}  " if at.batches > 1 else ""
    return f"{batch}{at.iteration + 1}/{at.iterations}  {_rate(at):.1f} it/s  loss {at.loss:.3f}  {at.active} active patches"


def _done(at: Iteration) -> int:
    return at.batch * at.iterations + at.iteration + 1


def _rate(at: Iteration) -> float:
    """Iterations per second: of this call, which may have gone on where another stopped."""
    return (_done(at) if at.made is None else at.made) / max(at.seconds, 1e-9)


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    with make_progress_bar() as bar:
        task = bar.add_task(title, total=None, state="")
        yield _now_and_then(BAR_EVERY, lambda at: bar.update(task, total=at.batches * at.iterations, completed=_done(at), state=_state(at)))


@contextmanager
def _lines(title: str, shown: bool) -> Iterator[Report]:
    def show(at: Iteration) -> None:
        left = (at.batches * at.iterations - _done(at)) / _rate(at)
        print(f"{title}  {_state(at)}  {left:.0f} s left", file=sys.stderr, flush=True)

    yield _now_and_then(PLAIN_EVERY, show) if shown else lambda at: None


def _now_and_then(every: float, show: Report) -> Report:
    """`show`, at most once in `every` seconds: it reads the loss, for which the device must have made the update."""
    last = time.monotonic()

    def report(at: Iteration) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            show(at)
            last = time.monotonic()  # after the wait, which is no part of the pause

    return report
