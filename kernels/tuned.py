"""Tiles by device: what limits them there, and those that were timed on a kind of GPU: `tiles/DEVICE.json`, written by `python -m bench.tune`, put in
the place of a kernel's own.

A tile has a slot: its operation and a name that says which kernel, number and sizes it is for. A launcher asks for
`tile(operation, slot, built_in, device)` and gets what was measured on that device or, where nothing was, the built-in one. The table of a device is
read once, when it is first asked for.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from smi.csrc.cache import json_of

FOLDER = Path(__file__).parent / "tiles"
MOST = 1 << 16  # of a number of a tile
Tile = TypeVar("Tile", bound=tuple)


class Limits(NamedTuple):
    """What the choice of a tile depends on.

    code: 80, 90 or 100, the instructions that multiply: mma from registers, wgmma, tcgen05; what fits into registers depends on it. processors:
    multiprocessors. shared: bytes of shared memory that a block gets at most, which differ within one generation.
    """

    code: int
    processors: int
    shared: int


INTERPRETED = Limits(90, 132, 227 * 1024)  # an H200's
CODE = {9: 90, 10: 100, 11: 100}  # by the major number of the capability; 8.x and 12.x, which has no tcgen05, and whatever follows: 80


@cache
def limits(device: torch.device) -> Limits:
    """Those of a device; of an H200 where kernels are interpreted."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return Limits(CODE.get(properties.major, 80), properties.multi_processor_count, properties.shared_memory_per_block_optin)


@dataclass
class Trial:
    """A slot that is being tried. numbers: its tile, the built-in one where None. built_in: set when a launcher asked for the slot."""

    operation: str
    slot: str
    numbers: tuple | None
    built_in: tuple | None = None


_trial: ContextVar[Trial | None] = ContextVar("trial", default=None)


def path_of(device_name: str) -> Path:
    """For example tiles/nvidia-h200.json."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json")


def read(path: Path) -> dict[str, dict[str, dict]]:
    """Operation -> slot -> its row of a table: `tile`, and how it was found; nothing where there is no file. Raises ValueError for what is no
    table."""
    if not path.exists():
        return {}
    try:
        found = json_of(path)["operations"]
        tiles = [row["tile"] for slots in found.values() for row in slots.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as a table of tiles ({type(error).__name__})") from error
    if not all(isinstance(tile, list) and tile and all(type(number) is int and 0 <= number < MOST for number in tile) for tile in tiles):
        raise ValueError(f"{path} holds a tile that is no list of whole numbers below {MOST}")
    return found


@cache
def table(device: torch.device) -> dict[tuple[str, str], tuple]:
    """The tiles of a device by operation and slot; none on the CPU, nor of a table that cannot be read, which is said."""
    if device.type != "cuda":
        return {}
    try:
        rows = read(path_of(torch.cuda.get_device_name(device)))
    except ValueError as error:
        print(f"smi: {error}; built-in tiles are used", file=sys.stderr)
        return {}
    return {(operation, slot): tuple(row["tile"]) for operation, slots in rows.items() for slot, row in slots.items()}


def tile(operation: str, slot: str, built_in: Tile, device: torch.device) -> Tile:
    """The tile of a slot on a device, of the built-in one's type."""
    tried = _trial.get()
    if tried is not None and (tried.operation, tried.slot) == (operation, slot):
        tried.built_in = tuple(built_in)
        found = tried.numbers
    else:
        found = table(device).get((operation, slot))
    if found is None or len(found) != len(built_in):  # of another kernel than this one
        return built_in
    return type(built_in)(*found) if hasattr(built_in, "_make") else tuple(found)


@contextmanager
def trial(operation: str, slot: str, numbers: tuple | None = None) -> Iterator[Trial]:
    """Within it, in this thread, that slot has these numbers, whatever the table says: how candidates are tried."""
    tried = Trial(operation, slot, numbers)
    token = _trial.set(tried)
    try:
        yield tried
    finally:
        _trial.reset(token)
