"""Times candidate tiles of the Triton kernels on this machine's GPU and writes its frozen tile table, kernels/tiles/DEVICE.json, which the launchers
consult (kernels/tuned.py).

    python -m bench.tune                              every operation; what an interrupted run had finished is kept
    python -m bench.tune --only attention             some operations
    python -m bench.tune --slots 'linear_gelu/fwd/*'  some slots, named "operation/slot"
    python -m bench.tune --seconds 240 --out FOLDER   end after this time; write the table elsewhere
    python -m bench.tune --again                      those that an earlier run finished, too

Runs offline from the repository's root, also where the package is not installed, with torch and triton alone. For every slot of the tile tables
(bench/tune/slots.py) the search starts at the built-in tile and goes to the fastest of its neighbours until none is faster. A candidate is checked
against float64 before it is timed; one that is wrong, spills registers or does not fit is left out, and the table says why. The built-in tile stays
unless another's 20 to 80 % band lies below its own.
"""

import argparse
import gc
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from smi.files import write_json
from smi.kernels import comparison, timing, tuned, verification, versions

from ..measuring import raw
from ..measuring.budget import Budget
from .compile import Compiler
from .slots import Slot, chosen, slots

KERNELS = Path(tuned.__file__).parent
RESERVE = 5.0  # seconds that a slot takes
ROUNDS = 10  # of a step of the search; three times as many between the winner and the built-in tile

Tile = tuple[int, ...]
Compile = Callable[[Iterable[tuple[Slot, Tile | None]]], None]
Timer = Callable[[dict[Tile, Callable[[], object]], torch.device, int], dict[Tile, list[float]]]


class Refused(Exception):
    """A candidate that is not to be timed, and why, in a few words."""


class Found(NamedTuple):
    """The tile to keep for a slot, its time and that of the built-in one in seconds, how many were timed, and why the others were not."""

    tile: Tile
    built_in: Tile
    seconds: float
    built_in_seconds: float
    timed: int
    refused: Counter

    def row(self) -> dict:
        return {
            "tile": list(self.tile),
            "built_in": list(self.built_in),
            "microseconds": round(self.seconds * 1e6, 2),
            "built_in_microseconds": round(self.built_in_seconds * 1e6, 2),
            "timed": self.timed,
            "refused": dict(self.refused),
        }


def time_all(runs: dict[Tile, Callable[[], object]], device: torch.device, rounds: int) -> dict[Tile, list[float]]:
    """Samples in seconds by tile: CUDA graphs, in alternating rounds."""
    return timing.alternate({tile: timing.captured(run, device) for tile, run in runs.items()}, device, rounds)


# ---- one candidate: whether it is right and fits


def results(slot: Slot, version: str, args: tuple) -> tuple[torch.Tensor, ...]:
    """What of the results of the slot's raw function is defined."""
    return slot.defined(args, raw.results(slot.operation, slot.function, version, args, slot.written))


class Truth(NamedTuple):
    """Arguments, what the definition makes of them in float64, and the error that is allowed of every result."""

    args: tuple
    results: tuple[torch.Tensor, ...]
    allowed: tuple[float, ...]


def truth_of(slot: Slot, args: tuple) -> Truth:
    """By the error rule: twice the error of same-precision PyTorch, plus the rounding of the truth."""
    exact, plain = (slot.defined(args, found) for found in raw.truth_and_plain(slot.operation, slot.function, args, slot.written))
    error = comparison.relative_error
    return Truth(args, exact, tuple(2 * error(p, t) + error(t.to(p.dtype), t) for p, t in zip(plain, exact, strict=True)))


@contextmanager
def compiled_kernels(operation: str) -> Iterator[list]:
    """The compiled kernels of an operation that are launched within it; none where kernels are interpreted."""
    from triton.runtime import JITFunction

    found, kernels = [], [f for f in vars(versions.load(operation, "triton")).values() if isinstance(f, JITFunction)]

    def recorder(run):
        def record(*args, **options):
            found.append(run(*args, **options))
            return found[-1]

        return record

    for kernel in kernels:
        kernel.run = recorder(kernel.run)
    try:
        yield found
    finally:
        for kernel in kernels:
            del kernel.run


def check(slot: Slot, tile: Tile, truths: list[Truth], launched=compiled_kernels) -> None:
    """Raise Refused unless the kernel compiles with this tile, fits without spills, and is right on all arguments."""
    try:
        with tuned.trial(slot.operation, slot.name, tile), launched(slot.operation) as kernels:
            outs = [results(slot, "triton", truth.args) for truth in truths]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's own reasons: too much shared memory, a shape that a layout does not take
        raise Refused(f"{type(error).__name__}: {error}".splitlines()[0][:100]) from error
    if any(kernel.n_spills for kernel in kernels):
        raise Refused("spills registers")
    for out, truth in zip(outs, truths, strict=True):
        errors = [comparison.relative_error(o, t) for o, t in zip(out, truth.results, strict=True)]
        if not all(error <= allowed for error, allowed in zip(errors, truth.allowed, strict=True)):
            raise Refused("wrong")


# ---- the search


def neighbours(tile: Tile, axes: dict[str, tuple[int, ...]]) -> list[Tile]:
    """Tiles of which one number is a step away on its axis, or one and the warps in the same direction."""

    def moved(tile: Tile, name: str, step: int) -> Tile | None:
        place, values = list(axes).index(name), axes[name]
        if tile[place] not in values or not 0 <= values.index(tile[place]) + step < len(values):
            return None
        return (*tile[:place], values[values.index(tile[place]) + step], *tile[place + 1 :])

    found = []
    for name in axes:
        for step in (-1, 1):
            single = moved(tile, name, step)
            found += [single, moved(single, "warps", step) if single and name != "warps" else None]
    return [t for t in dict.fromkeys(found) if t is not None]


def built_in_tile(slot: Slot, args: tuple) -> Tile:
    """What the launcher itself would take; raises LookupError where it does not ask for this slot."""
    with tuned.trial(slot.operation, slot.name) as tried:
        results(slot, "triton", args)
    if tried.built_in is None:
        raise LookupError(f"{slot.operation} does not ask for a tile {slot.name}")
    return tried.built_in


def no_compiler(candidates: Iterable[tuple[Slot, Tile | None]]) -> None:
    """Candidates are compiled when they are launched."""


def search(slot: Slot, device: torch.device, timer: Timer = time_all, launched=compiled_kernels, compiler: Compile = no_compiler) -> Found:
    """Downhill from the built-in tile, over neighbours that pass `check`. compiler: compiles candidates side by side before any is checked."""
    truths = [truth_of(slot, args) for args in slot.arguments(device)]
    args = tuple(arg.clone() if i in slot.written else arg for i, arg in enumerate(truths[0].args))  # timing writes into these
    built_in = best = built_in_tile(slot, args)
    check(slot, built_in, truths, launched)  # Refused where even this one fails: an error of the kernel, not of a candidate
    refused: Counter = Counter()
    met = {built_in}

    def run(tile: Tile) -> Callable[[], object]:
        def call() -> None:
            with tuned.trial(slot.operation, slot.name, tile):
                getattr(versions.load(slot.operation, "triton"), slot.function)(*args)

        return call

    timed = {built_in}
    while True:
        candidates, tried = [], [tile for tile in neighbours(best, slot.axes) if tile not in met]
        compiler((slot, tile) for tile in tried)
        for tile in tried:
            met.add(tile)
            try:
                check(slot, tile, truths, launched)
                candidates.append(tile)
            except Refused as reason:
                refused[str(reason)] += 1
        if not candidates:
            break
        timed.update(candidates)
        samples = timer({tile: run(tile) for tile in (best, *candidates)}, device, ROUNDS)
        winner = min(samples, key=lambda tile: timing.quantiles(samples[tile]).median)
        if winner == best:
            break
        best = winner
    samples = timer({tile: run(tile) for tile in dict.fromkeys((built_in, best))}, device, 3 * ROUNDS)
    band = {tile: timing.quantiles(values) for tile, values in samples.items()}
    if band[best].high >= band[built_in].low:
        best = built_in
    return Found(best, built_in, band[best].median, band[built_in].median, len(timed), refused)


# ---- the table


def source_of(operation: str) -> str:
    """A digest of the sources that a tile's time depends on: the operation's kernels, and what they share."""
    folder = KERNELS / operation
    digest = hashlib.sha256()
    for path in (folder / "kernel.py", folder / "tiles.py", KERNELS / "matmul.py"):
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:16]


def finished(path: Path, operation: str, again: bool) -> dict[str, dict]:
    """The slots of an operation that an earlier run finished with this source and this Triton."""
    if again or not path.exists():
        return {}
    made = json.loads(path.read_text())
    return made["operations"].get(operation, {}) if made["made"].get(operation) == made_with(operation) else {}


def made_with(operation: str) -> dict[str, str]:
    """With other versions or sources than these, tiles are timed again."""
    return {"triton": verification.installed("triton"), "torch": torch.__version__, "source": source_of(operation)}


def write(path: Path, device_name: str, operation: str, rows: dict[str, dict]) -> None:
    """Put the slots of an operation into the table of a device, whose other operations stay."""
    table = json.loads(path.read_text()) if path.exists() else {"device": device_name, "made": {}, "operations": {}}
    table["made"][operation] = made_with(operation)
    table["operations"][operation] = dict(sorted(rows.items()))
    write_json(path, table)


def tune(
    device: torch.device,
    device_name: str,
    every: list[Slot],
    again: bool = False,
    timer: Timer = time_all,
    launched=compiled_kernels,
    compiler: Compile = no_compiler,
    folder: Path | None = None,
    seconds: float = math.inf,
) -> list[str]:
    """Search every slot that is not finished, writing each as soon as it is; returns what failed or was left out. folder: of the table."""
    path, failed, budget = (folder or tuned.FOLDER) / tuned.path_of(device_name).name, [], Budget(seconds)
    left = [slot for slot in every if slot.name not in finished(path, slot.operation, again)]
    compiler((slot, None) for slot in left)
    for operation in dict.fromkeys(slot.operation for slot in every):
        rows = finished(path, operation, again)
        for slot in (s for s in every if s.operation == operation and s.name not in rows):
            if budget.left() < RESERVE:
                failed.append(f"{operation} {slot.name}: no time left")
                continue
            torch.manual_seed(0)
            try:
                found = search(slot, device, timer, launched, compiler)
            except Exception as error:  # one slot that fails must not cost the others
                failed.append(f"{operation} {slot.name}: {type(error).__name__}: {error}".splitlines()[0][:300])
                print(failed[-1], flush=True)
                continue
            rows[slot.name] = found.row()
            write(path, device_name, operation, rows)
            print(line(slot, found), flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return failed


def line(slot: Slot, found: Found) -> str:
    """What became of a slot, for the terminal."""
    kept = f"keeps {found.built_in}" if found.tile == found.built_in else f"{found.built_in} -> {found.tile}"
    times = f"{found.built_in_seconds * 1e6:.1f} -> {found.seconds * 1e6:.1f} us"
    reasons = "".join(f"; {count} left out: {reason}" for reason, count in found.refused.items())
    return f"{slot.operation} {slot.name}: {kept}, {times}, {found.timed} timed{reasons}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="OPERATION", choices=versions.OPERATIONS, help="these operations")
    parser.add_argument("--again", action="store_true", help="also what an earlier run finished")
    parser.add_argument("--slots", nargs="+", metavar="PATTERN", help="these slots, for example 'attention/fwd-*'")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no slot after this time")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the table goes, instead of kernels/tiles")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.tune times tiles on a CUDA GPU and torch finds none here; the built-in tiles need no table", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    try:
        every = chosen(slots(device, options.only), options.slots)
    except ValueError as error:
        parser.error(str(error))
    failed = tune(device, name, every, options.again, compiler=Compiler(device), folder=options.out, seconds=options.seconds)
    tuned.table.cache_clear()
    table = (options.out or tuned.FOLDER) / tuned.path_of(name).name
    print(f"tiles of {name} are in {table}; python -m bench.gpu checks and times the operations with them")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
