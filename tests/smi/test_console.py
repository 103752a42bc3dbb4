"""Tables where rich is not installed."""

import io
import sys

import pytest

import smi
from smi import console
from smi.distillation import small_student


def test_table_without_rich_has_the_same_cells():
    text = console.plain_table("title", ["name", "n"], [["a", "1"], ["bb", "22"]])
    assert text.splitlines() == ["title", "name   n", "a      1", "bb    22"]


class Tee:
    """What notebooks and loggers put in the place of stderr: it writes, and knows nothing else."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


class Closed(Tee):
    def write(self, text):
        raise ValueError("I/O operation on closed file")

    def isatty(self):
        raise OSError("no such device")


@pytest.mark.parametrize("stream", [Tee(), Closed(), None, io.StringIO()], ids=lambda stream: type(stream).__name__)
def test_progress_ends_no_run(stream, vit, monkeypatch):
    for module in ("smi.inversion.progress", "smi.distillation.progress"):
        monkeypatch.setattr(f"{module}.PLAIN_EVERY", 0.0)
    monkeypatch.setattr(sys, "stderr", stream)
    told = []
    images = smi.invert(vit, method="dense", num_images=4, iterations=3, on_iteration=told.append)
    assert len(told) == 3
    smi.distill(vit, small_student(vit), images, steps=2, eval_every=2, batch_size=2)
    if type(stream) is Tee:
        assert "3/3" in stream.text
        assert "distill  2/2" in stream.text


def test_a_callback_that_fails_is_no_progress(vit):
    def fail(at):
        raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        smi.invert(vit, method="dense", num_images=1, iterations=2, on_iteration=fail, progress=False)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_that_fails_ends_no_run(terminal, vit, monkeypatch):
    """A terminal whose other end is gone."""

    class Gone(io.StringIO):
        def isatty(self):
            return terminal

        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    assert len(smi.invert(vit, method="dense", num_images=1, iterations=2)) == 1
