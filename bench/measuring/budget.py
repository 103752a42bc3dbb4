"""How long to measure: the seconds that are left, and the rounds that fit into them."""

import time
from collections.abc import Callable, Iterator

import torch

LEAST_ROUNDS, MOST_ROUNDS = 3, 20


class Budget:
    """Seconds that are left of a run that must end."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def wall_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, its work on the device included."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def rounds_for(seconds: float, one_round: float) -> int:
    """As many rounds as fit into the time, within LEAST_ROUNDS and MOST_ROUNDS."""
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(one_round, 1e-9))))


def rounds_within(seconds: float) -> Iterator[int]:
    """Numbers of rounds of unknown length, from 0: one in any case, then while another as long as those before still fits, at most MOST_ROUNDS."""
    began = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done and (time.perf_counter() - began) * (done + 1) / done > seconds:
            return
        yield done
