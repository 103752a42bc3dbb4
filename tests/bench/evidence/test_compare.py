"""Intervals and paired tests, against their definitions."""

import pytest
import torch

from bench.evidence.compare import NORMAL, from_hex, interval, paired, to_hex

pytestmark = pytest.mark.fast
GENERATOR = torch.Generator().manual_seed(0)
COUNT = 998  # not a multiple of four


def drawn(probability):
    return torch.rand(COUNT, generator=GENERATOR) < probability


def test_bits_survive():
    right = drawn(0.7)
    assert torch.equal(from_hex(to_hex(right))[:COUNT].bool(), right)
    assert to_hex(torch.tensor([True, False, False, True, True])) == "91"


def test_an_interval_is_the_binomial_one():
    right = drawn(0.8)
    share = right.double().mean().item()
    assert interval([to_hex(right)], COUNT) == pytest.approx(NORMAL * (share * (1 - share) / (COUNT - 1)) ** 0.5)
    assert interval([to_hex(right)] * 3, COUNT) == pytest.approx(interval([to_hex(right)], COUNT))  # seeds on the same images are no new images


def test_pairs_see_what_intervals_do_not():
    """Two rows that differ on twenty images only: a difference of two points that is none of chance, though their intervals overlap."""
    base = drawn(0.8)
    worse = base.clone()
    worse[base.nonzero()[:20, 0]] = False
    difference, half, p = paired([to_hex(worse)], [to_hex(base)], COUNT)
    assert difference == pytest.approx(-20 / COUNT)
    assert half < abs(difference) < interval([to_hex(base)], COUNT)
    assert p < 1e-4
    assert paired([to_hex(base)], [to_hex(base)], COUNT) == (0.0, 0.0, 1.0)
    others = base.clone()
    others[base.nonzero()[:10, 0]], others[(~base).nonzero()[:10, 0]] = False, True
    assert paired([to_hex(others)], [to_hex(base)], COUNT)[2] == pytest.approx(1.0)
