"""The terminal's progress reads the loss now and then: reading waits for the device."""

import sys

import pytest
import torch

from smi import console
from smi.inversion import progress
from smi.inversion.progress import Iteration, show_progress

pytestmark = pytest.mark.fast


class Loss:
    """A loss on a device that takes `wait` seconds to be read."""

    def __init__(self, clock, wait):
        self.clock, self.wait, self.reads = clock, wait, 0

    def __float__(self):
        self.reads += 1
        self.clock[0] += self.wait
        return 1.5


@pytest.mark.parametrize(("terminal", "wait", "most"), [(True, 0.0, 51), (True, 0.3, 51), (False, 0.0, 1)])
def test_how_often_the_loss_is_read(monkeypatch, capsys, terminal, wait, most):
    """A thousand iterations of 10 ms: ten seconds, in which each is passed on and few are looked at."""
    clock, seen = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    loss = Loss(clock, wait)
    with show_progress(lambda at: seen.append(at.iteration), "title") as report:
        for i in range(1000):
            clock[0] += 0.0101
            report(Iteration(0, 1, i, 1000, loss, 46, 0.01 * (i + 1), *[torch.zeros(1)] * 3))
    assert seen == list(range(1000))
    assert most // 2 <= loss.reads <= most
    assert console.BAR_EVERY >= 0.2
