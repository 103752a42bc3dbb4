"""Compiles candidates in processes side by side, into Triton's cache, before the first of them is timed."""

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context

import torch

from smi.kernels import tuned, versions

from ..sections.warm import compile_only
from .slots import Slot, slots

Tile = tuple[int, ...]


class Compiler:
    """Processes that see no GPU: they compile for the architecture of `device`, whose launches then find the kernels in the cache."""

    def __init__(self, device: torch.device, processes: int | None = None):
        major, minor = torch.cuda.get_device_capability(device)
        self.architecture = 10 * major + minor
        self.pool = ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn"))

    def __call__(self, candidates: Iterable[tuple[Slot, Tile | None]]) -> None:
        """Compile slots in tiles, in the built-in one where there is None. What cannot be compiled is refused when it is checked."""
        work = [(self.architecture, slot.operation, slot.name, tile) for slot, tile in candidates]
        try:
            list(self.pool.map(compile_one, work))
        except BrokenProcessPool:  # the launches compile by themselves, one after another
            self.pool = ProcessPoolExecutor(mp_context=get_context("spawn"))


@cache
def prepared(architecture: int) -> dict[tuple[str, str], Slot]:
    """All slots by operation and name, in a process that launches nothing."""
    compile_only(architecture)
    return {(slot.operation, slot.name): slot for slot in slots(torch.device("meta"))}


def compile_one(work: tuple[int, str, str, Tile | None]) -> None:
    architecture, operation, name, tile = work
    slot = prepared(architecture).get((operation, name))
    if slot is None:
        return
    try:
        with tuned.trial(operation, name, tile):
            for args in slot.arguments(torch.device("meta")):
                getattr(versions.load(operation, "triton"), slot.function)(*args)
    except Exception:  # too much shared memory, a shape that a layout does not take: `check` says so
        return
