"""The terminal's progress reads the loss now and then: reading waits for the device."""

import json
import sys
from pathlib import Path

import pytest
import torch

from smi import console
from smi.errors import InputError
from smi.inversion import progress
from smi.inversion.progress import Iteration, log_to, show_progress

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


def test_a_log_holds_json_lines_of_now_and_then_and_of_each_batch(monkeypatch, tmp_path):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    for batch in range(2):  # a run that goes on appends
        with log_to(tmp_path / "log") as report:
            for i in range(100):
                clock[0] += 0.0101
                report(Iteration(batch, 2, i, 100, torch.tensor(1.5), 46, 0.01 * (i + 1), *[torch.zeros(1)] * 3))
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["batch"] == 0] == [49, 99]
    assert lines[-1] | {"time": ""} == {
        "time": "", "its_per_second": pytest.approx(200.0), "batch": 1, "batches": 2, "iteration": 99, "iterations": 100, "loss": 1.5, "active": 46,
    }  # fmt: skip


def test_a_log_that_cannot_be_opened_is_refused_and_one_that_cannot_be_written_ends_nothing(tmp_path):
    with pytest.raises(InputError, match="the log .* cannot be written"), log_to(tmp_path):
        pass
    with log_to(Path("/dev/full")) as report:
        for i in range(2):
            report(Iteration(0, 1, i, 2, torch.tensor(1.5), 46, 0.01, *[torch.zeros(1)] * 3))


@pytest.mark.parametrize("path", ["log", "/dev/full"])
def test_an_error_of_the_run_passes_through_its_log(tmp_path, path):
    def run():
        with log_to(tmp_path / path) as report:
            report(Iteration(0, 1, 0, 1, torch.tensor(1.5), 46, 0.01, *[torch.zeros(1)] * 3))
            raise OSError("of the run")

    with pytest.raises(OSError, match="of the run"):
        run()


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_null_in_the_log(tmp_path, loss):
    with log_to(tmp_path / "log") as report:
        report(Iteration(0, 1, 0, 1, torch.tensor(loss), 46, 0.01, *[torch.zeros(1)] * 3))
    assert json.loads((tmp_path / "log").read_text(), parse_constant=pytest.fail)["loss"] is None


def test_a_run_that_goes_on_tells_its_own_rate(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with show_progress(None, "title") as report:
        report(Iteration(2, 4, 49, 100, 1.5, 46, 1.0, *[torch.zeros(1)] * 3, made=50))
    assert "50.0 it/s" in (shown := capsys.readouterr().err)
    assert "3 s left" in shown
