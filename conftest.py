"""Before any test: Triton's interpreter where there is no GPU. After each: a fast test was fast."""

import os
import time

import pytest
import torch

FAST_SECONDS = 10  # of processor time

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything (timm, for one) imports triton


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Fail a test marked fast, and not slow, that passes but takes too long: in processor time, which a busy machine does not stretch, and with one
    thread, as `make` runs the tests, because threads that wait for each other count too."""
    before = time.process_time()
    result = yield
    seconds = time.process_time() - before
    if seconds > FAST_SECONDS and torch.get_num_threads() == 1 and item.get_closest_marker("fast") and not item.get_closest_marker("slow"):
        pytest.fail(f"took {seconds:.1f} s of processor time, a fast test takes at most {FAST_SECONDS}: mark it slow, or its module not fast")
    return result
