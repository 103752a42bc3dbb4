"""Progress of a training on the terminal: a bar, or a line now and then where stderr is no terminal."""

import sys
import time
from typing import Any

from ..console import PLAIN_EVERY, is_terminal, make_progress_bar, never_failing


class TrainingProgress:
    """A context manager; called with the number of steps done and what to say about them."""

    def __init__(self, title: str, total: int, done: int, shown: bool = True) -> None:
        self.title, self.total, self.first, self.shown = title, total, done, shown
        self.bar: Any = None
        self.show = never_failing(self._show)

    def __enter__(self) -> "TrainingProgress":
        self.began = self.last = time.monotonic()
        if self.shown and is_terminal(sys.stderr):
            self.bar = make_progress_bar()
            self.bar.__enter__()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.first, state="")
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.__exit__(*error)

    def __call__(self, done: int, about: str) -> None:
        self.show(done, about)

    def _show(self, done: int, about: str) -> None:
        now = time.monotonic()
        rate = (done - self.first) / max(now - self.began, 1e-9)
        state = f"{done}/{self.total}  {rate:.1f} it/s  {about}"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, state=state)
        elif self.shown and now - self.last >= PLAIN_EVERY:
            self.last = now
            print(f"{self.title}  {state}  {(self.total - done) / max(rate, 1e-9):.0f} s left", file=sys.stderr, flush=True)
