"""Checks in processes of their own: one that dies, hangs or breaks its context takes no other with it. And the check itself, on the CPU."""

import time

import pytest
import torch

from smi.kernels import versions
from smi.kernels.check_process import Checker, self_check
from smi.kernels.verdicts import Key

pytestmark = pytest.mark.fast

CPU = torch.device("cpu")
# Answers as a process with a CUDA context does: after an illegal access every later call of CUDA fails.
PRETENDER = """
import json, os, signal, sys, time
broken = False
for line in sys.stdin:
    key = json.loads(line)["key"]
    if key[4] == "segmentation fault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if key[4] == "exits":
        sys.exit(3)
    if key[4] == "hangs":
        time.sleep(60)
    broken = broken or key[4] == "illegal access"
    outcome, note = ("crashed", "CUDA error: an illegal memory access was encountered") if broken else ("correct", str(os.getpid()))
    print(json.dumps([*key, "incorrect" if key[4] == "wrong" else outcome, 2.0, note]), flush=True)
"""


def key(size: str, function: str = "forward", version: str = "stock") -> Key:
    return Key("layer_norm", function, version, "float32", size)


@pytest.fixture
def checker():
    with Checker(seconds=10.0, code=PRETENDER) as made:
        yield made


@pytest.mark.parametrize(
    ("trouble", "note"),
    [
        ("illegal access", "illegal memory access"),
        ("segmentation fault", "its process was ended by SIGSEGV"),
        ("exits", "its process ended with exit code 3"),
    ],
)
def test_trouble_condemns_nothing_else(checker, trouble, note):
    """And is found in a process in which nothing ran before."""
    first, again = checker.check(key("a"), CPU), checker.check(key("b"), CPU)
    found = checker.check(key(trouble), CPU)
    after = checker.check(key("c"), CPU)
    assert (found.outcome, found.lasting, found.chosen) == ("crashed", False, False)
    assert note in found.note
    assert first.correct
    assert again.correct
    assert after.correct
    assert first.note == again.note != after.note  # processes are shared as long as checks succeed


def test_a_check_that_hangs_is_ended(monkeypatch):
    began = time.monotonic()
    with Checker(seconds=0.5, code=PRETENDER) as checker:
        assert checker.check(key("hangs"), CPU).note == "no answer within 0.5 s"
        checker.seconds = 10.0
        assert checker.check(key("a"), CPU).correct
    assert time.monotonic() - began < 8


def test_a_bad_verdict_comes_from_a_new_process(checker):
    first = checker.check(key("a"), CPU)
    process = checker.process
    assert checker.check(key("wrong"), CPU).outcome == "incorrect"
    assert process.returncode is not None
    assert checker.check(key("a"), CPU).note != first.note


def test_a_process_that_ended_meanwhile_is_replaced(checker):
    assert checker.check(key("a"), CPU).correct
    checker.process.kill()
    assert checker.check(key("a"), CPU).correct


@pytest.mark.slow
def test_the_process_itself():
    """The real one, which imports what this one does: stock against stock on the CPU."""
    with Checker() as checker:
        found = checker.check(key("d64"), CPU)
        assert found.correct
        assert found.speedup > 0
        assert "allowed" in found.note
        assert checker.check(key("d16384", version="triton"), CPU).outcome == "unsupported"
        checker.process.stdin.close()
        assert checker.process.wait(10) == 0  # nobody can ask it anything any more


@pytest.fixture
def small(monkeypatch):
    """Few rows."""
    sizes = versions.sizes_of("layer_norm")
    several = sizes.arguments
    monkeypatch.setattr(sizes, "arguments", lambda *a: list(several(*a))[1:])
    return versions.load("layer_norm", "stock")


def test_a_wrong_result_is_incorrect(small, monkeypatch):
    assert self_check(key("d64", "backward"), CPU).correct
    right = small.backward
    monkeypatch.setattr(small, "backward", lambda *args: right(*args) * 1.001)
    found = self_check(key("d64", "backward"), CPU)
    assert (found.outcome, found.wrong, found.lasting) == ("incorrect", True, True)
    assert "in out0" in found.note


def test_memory_that_a_version_does_not_write_is_poisoned(small, monkeypatch):
    """By the check itself, and not after it."""
    torch.use_deterministic_algorithms(False)  # which the fixture of all tests switched on
    right, fresh = small.backward, []

    def backward(*args):
        fresh.append(torch.empty(3).isnan().all())
        return right(*args)

    monkeypatch.setattr(small, "backward", backward)
    assert self_check(key("d64", "backward"), CPU).correct
    assert fresh[0]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "crashed"),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), "crashed"),
        (torch.OutOfMemoryError("no memory"), "crashed"),
        (RuntimeError("does not compile"), "failed"),
    ],
)
def test_an_error_of_the_machine_is_no_verdict(small, monkeypatch, error, outcome):
    def broken(*args):
        raise error

    monkeypatch.setattr(small, "forward", broken)
    found = self_check(key("d64"), CPU)
    assert found.outcome == outcome
    assert str(error) in found.note


def test_tiles_that_do_not_fit_are_a_verdict(small, monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors")

    def broken(*args):
        raise errors.OutOfResources(106624, 101376, "shared memory")

    monkeypatch.setattr(small, "forward", broken)
    found = self_check(key("d64"), CPU)
    assert (found.outcome, found.lasting) == ("failed", True)


def test_what_a_version_does_not_take_is_unsupported(small, monkeypatch):
    monkeypatch.setattr(small, "unsupported", lambda function, *args: "it takes no odd rows", raising=False)
    found = self_check(key("d64"), CPU)
    assert (found.outcome, found.wrong, found.note) == ("unsupported", False, "it takes no odd rows")
