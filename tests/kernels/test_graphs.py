"""Streams of captured graphs, on a machine with two GPUs that is none: torch.cuda.graph itself runs, what it asks of the driver is replaced."""

from contextlib import contextmanager

import pytest
import torch

from smi.kernels import graphs

pytestmark = pytest.mark.fast


class Driver:
    """Streams by device, the current ones, and what was captured where."""

    def __init__(self):
        self.device, self.current, self.log, self.ends_well = 0, {}, [], True

    def stream(self, device=None):
        index = self.device if device is None or device.index is None else device.index
        return self.current.setdefault(index, FakeStream(self, index))


class FakeStream:
    def __init__(self, driver, index):
        self.driver, self.index = driver, index

    def wait_stream(self, other):
        assert other.index == self.index


class FakeGraph:
    driver: Driver

    def capture_begin(self, **options):
        self.driver.log.append(("capture", self.driver.device, self.driver.stream()))

    def capture_end(self):
        if not self.driver.ends_well:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()

    @contextmanager
    def on_device(device):
        before, driver.device = driver.device, driver.device if device.index is None else device.index
        try:
            yield
        finally:
            driver.device = before

    class OnStream:  # as in PyTorch: a context that is left only where __exit__ is called
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            self.before = driver.device, driver.current.get(self.stream.index)
            driver.device, driver.current[self.stream.index] = self.stream.index, self.stream

        def __exit__(self, *error):
            driver.device, driver.current[self.stream.index] = self.before

    FakeGraph.driver = driver
    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(torch.cuda, "stream", OnStream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: FakeStream(driver, driver.device if device is None else device.index))
    monkeypatch.setattr(torch.cuda, "current_stream", driver.stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: driver.device)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", FakeStream(driver, 0))  # as after a capture on the first GPU
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    graphs.side_stream.cache_clear()
    yield driver
    graphs.side_stream.cache_clear()


def test_every_device_has_one_stream_for_all_its_graphs(driver):
    order = []
    for index in (0, 1, 1, 0):
        graphs.capture(lambda: order.append("run"), torch.device("cuda", index), 2, lambda: order.append("undo"))
    captures = [(device, stream.index) for _, device, stream in driver.log]
    assert captures == [(0, 0), (1, 1), (1, 1), (0, 0)]
    assert len({stream for *_, stream in driver.log}) == 2
    assert order[:5] == ["run", "undo", "run", "undo", "run"]
    assert driver.device == 0


def test_a_device_without_a_number_is_the_current_one(driver):
    driver.device = 1
    graphs.capture(lambda: None, torch.device("cuda"), 1)
    assert [device for _, device, _ in driver.log] == [1]


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_capture_that_fails_leaves_device_and_stream_and_says_its_own_reason(driver, ends_well):
    before, driver.ends_well = driver.stream(torch.device("cuda", 1)), ends_well
    calls = []

    def run():
        calls.append(0)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        graphs.capture(run, torch.device("cuda", 1), 2)
    assert driver.device == 0
    assert driver.stream(torch.device("cuda", 1)) is before


def test_a_capture_that_does_not_end_is_an_error(driver):
    driver.ends_well = False
    before = driver.stream()
    with pytest.raises(RuntimeError, match="during capture"):
        graphs.capture(lambda: None, torch.device("cuda", 0), 1)
    assert driver.stream() is before
