"""The gates: what is worse is caught, what is only noise is not; exact numbers are compared exactly."""

import argparse
import json
import random

import pytest
import torch

from bench import check
from bench.gates import exact, ratios
from bench.measuring.record import BASELINE
from smi.kernels.timing import Quantiles, quantiles

pytestmark = pytest.mark.fast

MINE, OTHER = 0.1, 0.3  # seconds of the two sides
TRIALS = 60


class Machine:
    """A clock that two sides of known cost move, under a noise: a function of (random, side, seconds so far) that gives a factor."""

    def __init__(self, seed: int, noise, slow: float = 1.0):
        self.now, self.random, self.noise, self.slow = 0.0, random.Random(seed), noise, slow

    def clock(self) -> float:
        return self.now

    def work(self, side: str) -> None:
        cost = MINE * self.slow if side == "mine" else OTHER
        self.now += cost * self.noise(self.random, side, self.now)

    def sample(self, rounds: int) -> list[float]:
        return ratios.speedups(lambda: self.work("mine"), lambda: self.work("other"), rounds, self.clock)


def jitter(r, side, now):
    return r.lognormvariate(0, 0.04)


def interruptions(r, side, now):
    return r.lognormvariate(0, 0.02) * (3 if r.random() < 0.2 else 1)


def drift(r, side, now):
    return r.lognormvariate(0, 0.02) * (1 + 0.5 * min(1.0, now / 5))


def bursts(r, side, now):
    """Other work every few seconds, which slows both sides alike."""
    return r.lognormvariate(0, 0.03) * (1.6 if int(now) % 3 == 0 else 1)


def contention(r, side, now):
    """The side that moves more memory suffers more."""
    return r.lognormvariate(0, 0.05) * (1.08 if side == "mine" else 1.0)


NOISES = [jitter, interruptions, drift, bursts, contention]


def verdict(noise, seed: int, slow: float):
    before = quantiles(Machine(1000 + seed, jitter).sample(ratios.MORE_ROUNDS))
    return ratios.judge("step", Machine(seed, noise, slow).sample, before)


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.__name__)
def test_noise_raises_no_alarm_and_thirty_percent_does(noise):
    assert not any(verdict(noise, seed, 1.0).regressed for seed in range(TRIALS))
    assert all(verdict(noise, seed, 1.3).regressed for seed in range(TRIALS))


def test_a_suspicion_is_measured_again():
    rounds = []

    def sample(number):
        rounds.append(number)
        return [2.0] * number if number == ratios.ROUNDS else [3.0] * number  # slow once

    assert not ratios.judge("step", sample, Quantiles(2.9, 3.0, 3.1)).regressed
    assert rounds == [ratios.ROUNDS, ratios.MORE_ROUNDS]


def test_a_regression_needs_the_threshold_and_disjoint_bands():
    before = Quantiles(2.9, 3.0, 3.1)
    assert ratios.regressed(Quantiles(2.3, 2.4, 2.5), before)
    assert not ratios.regressed(Quantiles(2.7, 2.75, 2.8), before)  # disjoint, but near
    assert not ratios.regressed(Quantiles(1.0, 2.0, 3.0), before)  # far, but the bands meet
    assert not ratios.regressed(Quantiles(4.0, 4.1, 4.2), before)
    assert ratios.slower(Quantiles(1.3, 1.4, 1.5), Quantiles(0.9, 1.0, 1.1))
    assert not ratios.slower(Quantiles(0.5, 0.6, 0.7), Quantiles(0.9, 1.0, 1.1))


@pytest.fixture
def one_thread():
    """As the gate measures: a waiting second thread takes processor time as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_planted_slowdown_takes_processor_time(one_thread):
    """On the real clock: the ratio falls to about 1/1.5."""
    a = torch.randn(256, 256)
    runs = (lambda: a @ a), (lambda: (a @ a, a @ a, a @ a))
    fall = []
    for _ in range(7):  # in turn, so that what slows the machine slows both
        honest, planted = (ratios.speedups(*runs, 1, slow=slow)[0] for slow in (1.0, 1.5))
        fall.append(honest / planted)
    assert 1.2 < quantiles(fall).median < 1.9


def test_the_first_side_alternates_and_a_sample_is_the_smallest():
    order, now = [], [0.0]

    def side(name):
        def run():
            order.append(name)
            now[0] += 1.0

        return run

    assert ratios.speedups(side("a"), side("b"), 2, lambda: now[0]) == [1.0, 1.0]
    assert order[-4 * ratios.CALLS :] == ["a"] * ratios.CALLS + ["b"] * 2 * ratios.CALLS + ["a"] * ratios.CALLS
    costs = iter([5.0, 1.0, 7.0])

    def interrupted():
        now[0] += next(costs)

    assert ratios.seconds(interrupted, 3, 1, lambda: now[0]) == 1.0


def test_exact_flops_are_the_committed_ones():
    committed = json.loads((BASELINE / "exact.json").read_text())
    assert exact.exact_flops() == committed["flops"]


def test_differences_name_what_changed_came_and_went():
    now, before = {"flops": {"a": 1, "b": 2, "d": 4}}, {"flops": {"a": 1, "b": 3, "c": 5}}
    assert exact.differences(now, before) == [("flops: b", 3, 2), ("flops: c", 5, "-"), ("flops: d", "-", 4)]
    assert exact.differences(now, now) == []
    other = {"kept_bytes": {"eager": 1, "fused float32 (cpu)": 2}}, {"kept_bytes": {"eager": 1, "fused float32 (dispatched)": 3}}
    assert exact.differences(*other) == []  # this machine has no compiler, for example
    assert exact.differences({"kept_bytes": {"eager": 1, "fused x": 2}}, {"kept_bytes": {"eager": 1, "fused x": 3}})


@pytest.fixture
def quick(monkeypatch):
    """Ratio cases of no model, on given ratios."""
    speedup = {"now": 3.0}
    monkeypatch.setattr(ratios, "RATIO_CASES", ratios.RATIO_CASES[1:2])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    step = argparse.Namespace(resolved="x")
    monkeypatch.setattr(ratios, "sides_of", lambda case, others, *_: ratios.Sides(dict.fromkeys(("ours", *others), step), "float32", None))
    monkeypatch.setattr(ratios, "speedups", lambda mine, other, rounds, slow: [speedup["now"] / slow] * rounds)
    return speedup


def test_ratios_from_update_to_alarm(quick, tmp_path, capsys):
    folder = ["--ratios", "--quick", "--baseline", str(tmp_path)]
    assert check.main(folder) == 0
    assert "there is no baseline" in capsys.readouterr().out
    assert check.main([*folder, "--update"]) == 0
    (file,) = tmp_path.iterdir()
    written = json.loads(file.read_text())
    assert written["commit"]
    assert [case["over"] for case in written["cases"].values()] == [{"eager": [3.0, 3.0, 3.0]}]
    assert check.main(folder) == 0
    assert check.main([*folder, "--repeat", "3"]) == 0
    assert "0 alarms in 3 repetitions" in capsys.readouterr().out
    assert check.main([*folder, "--slow", "1.3"]) == 1
    assert "REGRESSED" in capsys.readouterr().out
    quick["now"] = 2.0
    assert check.main([*folder, "--repeat", "2"]) == 1
    assert "2 alarms in 2 repetitions" in capsys.readouterr().out


def test_exact_gate_from_update_to_alarm(monkeypatch, tmp_path, capsys):
    kept = {"ours": 100}
    monkeypatch.setattr(exact, "exact_kept_bytes", lambda: dict(kept))
    monkeypatch.setattr(check, "check_compiled", lambda full: 0)
    arguments = ["--exact", "--baseline", str(tmp_path)]
    assert check.main(arguments) == 1  # nothing committed
    assert check.main([*arguments, "--update"]) == 0
    assert check.main(arguments) == 0
    kept["ours"] = 101
    assert check.main(arguments) == 1
    assert "kept_bytes: ours" in capsys.readouterr().out


@pytest.mark.slow
def test_kept_bytes_are_the_committed_ones():
    committed = json.loads((BASELINE / "exact.json").read_text())
    assert exact.differences({"kept_bytes": exact.exact_kept_bytes()}, committed) == []
