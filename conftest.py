"""Before any test: Triton's interpreter where there is no GPU. After each of `make test-fast`: it was fast."""

import os

import pytest
import torch

FAST_SECONDS = 10  # of processor time, child processes included

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything (timm, for one) imports triton


def _processor_seconds() -> float:
    return sum(os.times()[:4])  # user and system, of this process and of children that have ended


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Where only fast tests are asked for (-m fast ...), fail one that passes but takes too long: in processor time, which a busy machine does not
    stretch, and with one thread, as `make` runs the tests, because threads that wait for each other count too."""
    before = _processor_seconds()
    result = yield
    seconds = _processor_seconds() - before
    if seconds > FAST_SECONDS and "fast" in item.config.option.markexpr and torch.get_num_threads() == 1:
        pytest.fail(f"took {seconds:.1f} s of processor time, a fast test takes at most {FAST_SECONDS}: mark it slow, or its module not fast")
    return result
