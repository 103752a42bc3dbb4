"""The ratios of the sparse methods to dense inversion, from the steps of their stages."""

import pytest

from bench.experiments import claims
from smi.inversion.methods import DENSE, PRI7, SMI

PRI7_BY_PATCHES = 7 * 196 * 4000 / (571 * (196 + 168 + 140 + 112 + 84 + 56) + 574 * 28)


class Step:
    """One whose time is its patches."""

    def __init__(self, active: int):
        self.active = active

    def __call__(self) -> None:
        pass


def test_a_step_that_costs_by_its_patches():
    seconds = {active: float(active) for method in (DENSE, SMI, PRI7) for active, _ in claims.stages_of(method)}
    assert claims.images_over_dense(DENSE, seconds) == 1
    assert claims.images_over_dense(SMI, seconds) == pytest.approx(196 * 4000 / sum(active * n for active, n in claims.stages_of(SMI)))
    assert claims.images_over_dense(PRI7, seconds) == pytest.approx(PRI7_BY_PATCHES)


def test_rounds_are_ratios_by_themselves(monkeypatch):
    """A machine that becomes slower from round to round changes no ratio."""
    calls = []

    def elapsed(step, device, repeats, before):
        assert before is step
        calls.append(step.active)
        return step.active * (1 + (len(calls) - 1) // 11)

    monkeypatch.setattr(claims, "elapsed", elapsed)
    ratios, dense = claims.measure(Step, 3)
    assert dense.active == 196
    assert calls[:11] == sorted(calls[:11]) == calls[21:10:-1]
    assert ratios[PRI7] == pytest.approx([PRI7_BY_PATCHES] * 3)
    assert ratios[SMI] == pytest.approx(ratios[SMI][:1] * 3)
