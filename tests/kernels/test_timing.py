"""Things measured against each other take turns, and samples become quantiles."""

import pytest
import torch

from smi.kernels import timing

CPU = torch.device("cpu")


def test_rounds_alternate():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = timing.alternate(runs, CPU, rounds=4, before=lambda: order.append("flush"))
    assert [name for name in order if name != "flush"] == list("abbaabba")
    assert order[:2] == ["flush", "a"]
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4}


def test_samples_last_about_as_long_as_asked():
    calls = []
    timing.alternate({"a": lambda: calls.append(0)}, CPU, rounds=2, sample_seconds=1e-4)
    assert len(calls) > 20  # many short calls to a sample, not one


def test_quantiles():
    assert timing.quantiles([3.0]) == (3, 3, 3)
    assert timing.quantiles([float(i) for i in range(11)]) == (2, 5, 8)
    assert timing.quantiles([2.0, 1.0]) == pytest.approx((1.2, 1.5, 1.8))
