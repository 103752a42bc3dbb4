"""Before any test: Triton's interpreter where there is no GPU. After each: a fast test was fast."""

import os
import time

import pytest
import torch

FAST_SECONDS = 5

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything (timm, for one) imports triton


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Fail a test marked fast, and not slow, that passes but takes too long, by the clock (many threads) and by processor time (a busy machine)."""
    before = time.perf_counter(), time.process_time()
    result = yield
    seconds = min(time.perf_counter() - before[0], time.process_time() - before[1])
    if seconds > FAST_SECONDS and item.get_closest_marker("fast") and not item.get_closest_marker("slow"):
        pytest.fail(f"took {seconds:.1f} s, more than the {FAST_SECONDS} s of a fast test: mark it slow, or take it out of what is marked fast")
    return result
