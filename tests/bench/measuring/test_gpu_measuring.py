"""What is measured otherwise on a GPU than on the CPU, without one."""

from types import SimpleNamespace

import pytest
import torch

from bench.cases.suites import TINY, MemoryCase
from bench.measuring import inversions, memory
from smi.kernels import timing

pytestmark = pytest.mark.fast


def test_memory_of_all_sides_is_measured_in_one_process(monkeypatch):
    """Each process would take seconds to start, of the minutes that there are."""
    monkeypatch.setattr(memory, "build_model", lambda *args: None)
    monkeypatch.setattr(memory, "make_step", lambda *args, **options: SimpleNamespace(kept_bytes=lambda: 5))
    monkeypatch.setattr(memory, "measure_process", lambda side, *args: {"peak_above_idle_bytes": 7, "resolved": side})
    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **options: pytest.fail("a process was started"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    rows = memory.measure_memory(MemoryCase(TINY, 2), torch.device("cuda", 0))
    assert [(row["side"], row.get("kept_bytes"), row.get("peak_above_idle_bytes")) for row in rows] == [(s, 5, 7) for s in MemoryCase(TINY, 2).sides]


def test_a_captured_step_is_replayed_ten_times_a_sample_and_eager_once():
    steps = {"ours": SimpleNamespace(resolved="fused bfloat16, CUDA graph"), "eager": SimpleNamespace(resolved="eager float32")}
    calls = inversions.replays_of(steps)
    assert calls == {"ours": 10, "eager": 1}
    made = []
    timing.alternate({name: lambda name=name: made.append(name) for name in steps}, torch.device("cpu"), rounds=2, calls=calls)
    assert (made.count("ours"), made.count("eager")) == (20, 2)
