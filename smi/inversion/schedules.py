"""Dense, SMI and PRI as data: a schedule says at which iterations how many patches leave, which ones, and what becomes of them.

SMI (arXiv 2510.27186) drops the patches of lowest importance; PRI (arXiv 2509.23235) emits those of highest importance as finished sparse images.
What is still active at the end is always emitted.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..plain import shown, whole

PUBLISHED_ITERATIONS = 4000
SMI_PRUNE_AT = (50, 100, 200, 300)  # of 4000 iterations
SMI_PRUNE_RATIO = 0.3
DIVISION = 7  # images per trajectory of PRI, the largest published


@dataclass(frozen=True)
class Event:
    """Before iteration `iteration` (the number of updates so far), `count` active patches of each image leave."""

    iteration: int  # 1 .. iterations; at the last one, after the last update
    count: int  # patches
    which: str  # "lowest" or "highest" importance
    fate: str  # "drop" or "emit"

    def __post_init__(self) -> None:
        for name, take in (("iteration", whole()), ("count", whole())):
            object.__setattr__(self, name, take(f"an event's {name}", getattr(self, name)))
        if not (isinstance(self.which, str) and isinstance(self.fate, str)):
            raise InputError(f"an event takes the 'lowest' or 'highest' patches to 'drop' or 'emit', got {shown(self.which)} and {shown(self.fate)}")


@dataclass(frozen=True)
class Stage:
    """Iterations start <= t < stop with `active` patches, closed by `event` (None: the run's end)."""

    start: int
    stop: int
    active: int
    event: Event | None


@dataclass(frozen=True)
class Schedule:
    """What happens to the `num_patches` patches of every image in `iterations` iterations; checked when made (InputError)."""

    num_patches: int
    iterations: int
    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        try:
            events: tuple[Any, ...] = tuple(self.events)
        except TypeError:
            events = (self.events,)
        if not all(isinstance(event, Event) for event in events):
            raise InputError("a schedule's events must be a sequence of smi.Event")
        for name, value in (
            ("num_patches", whole(1)("num_patches", self.num_patches)),
            ("iterations", whole()("iterations", self.iterations)),
            ("events", events),
        ):
            object.__setattr__(self, name, value)
        if self.iterations < (1 if self.events else 0):
            raise InputError(f"iterations must be at least {1 if self.events else 0}, got {self.iterations}")
        active, last, sizes = self.num_patches, 0, set()
        for event in self.events:
            if event.which not in ("lowest", "highest") or event.fate not in ("drop", "emit"):
                raise InputError(f"an event takes the 'lowest' or 'highest' patches to 'drop' or 'emit', got {event.which!r} and {event.fate!r}")
            if not last < event.iteration <= self.iterations:
                raise InputError(f"events must come in order at distinct iterations from 1 to {self.iterations}: {event.iteration} follows {last}")
            if not 1 <= event.count < active:
                taken = f"{event.count} of {active} active patches"
                raise InputError(f"the event at iteration {event.iteration} takes {taken}: it must take at least 1 and leave at least 1")
            active, last = active - event.count, event.iteration
            sizes |= {event.count} if event.fate == "emit" else set()
        if sizes | {active} != {active}:
            raise InputError(f"every image must have the same number of patches: this schedule emits {sorted(sizes)} and ends with {active}")

    def stages(self) -> Iterator[Stage]:
        """The stages in order; their shapes are static."""
        start, active = 0, self.num_patches
        for event in self.events:
            yield Stage(start, event.iteration, active, event)
            start, active = event.iteration, active - event.count
        if start < self.iterations or not self.events:
            yield Stage(start, self.iterations, active, None)

    @property
    def images_per_trajectory(self) -> int:
        return 1 + sum(event.fate == "emit" for event in self.events)

    @property
    def patches_per_image(self) -> int:
        return self.num_patches - sum(event.count for event in self.events)

    @property
    def sparsity(self) -> float:
        """Share of patches that a finished image lacks."""
        return 1 - self.patches_per_image / self.num_patches

    def still_iterations(self) -> set[int]:
        """Iterations without augmentation: the one before an event, which ranks the patches, and the event's own."""
        return {t for event in self.events for t in (event.iteration - 1, event.iteration) if t < self.iterations}


def scale_events(at: Sequence[int], iterations: int) -> list[int]:
    """Iterations given for a run of 4000, scaled to `iterations` and kept distinct, at least 1 (docs/methods.md)."""
    scaled, last = [], 0
    for iteration in at:
        last = max(last + 1, round(iteration * iterations / PUBLISHED_ITERATIONS))
        scaled.append(last)
    return scaled


def dense(num_patches: int, iterations: int = PUBLISHED_ITERATIONS) -> Schedule:
    """DeepInversion: no events, one image a trajectory."""
    if iterations < 1:
        raise InputError(f"iterations must be at least 1, got {iterations}")
    return Schedule(num_patches, iterations)


def sparse(
    num_patches: int, iterations: int = PUBLISHED_ITERATIONS, prune_at: Sequence[int] | None = None, prune_ratio: float = SMI_PRUNE_RATIO
) -> Schedule:
    """SMI: at each iteration of prune_at the prune_ratio of the active patches with the lowest importance are dropped.

    prune_at: iterations of this run; None scales the published (50, 100, 200, 300 of 4000). floor(active * (1 - prune_ratio)) patches stay.
    """
    if not 0 < prune_ratio < 1:
        raise InputError(f"prune_ratio must lie between 0 and 1, got {prune_ratio}")
    if prune_at is None and iterations < len(SMI_PRUNE_AT):
        raise InputError(f"smi needs at least {len(SMI_PRUNE_AT)} iterations for its {len(SMI_PRUNE_AT)} prune events, got {iterations}")
    events, active = [], num_patches
    for iteration in scale_events(SMI_PRUNE_AT, iterations) if prune_at is None else prune_at:
        kept = math.floor(active * (1 - prune_ratio) + 1e-9)  # 1e-9: a count that is whole but for rounding counts as whole
        events.append(Event(iteration, active - kept, "lowest", "drop"))
        active = kept
    return Schedule(num_patches, iterations, tuple(events))


def patch_rebirth(num_patches: int, iterations: int = PUBLISHED_ITERATIONS, division: int = DIVISION) -> Schedule:
    """PRI: after every floor(iterations / v) iterations the floor(N / v) active patches of highest importance are emitted, v images a trajectory.

    Where v does not divide N, the last image too has floor(N / v) patches: the rest, of lowest importance, is dropped at the end.
    """
    if not 1 <= division <= num_patches:
        raise InputError(f"division must lie between 1 and the number of patches, {num_patches}, got {division}")
    if division > iterations:
        raise InputError(f"division {division} needs at least {division} iterations, got {iterations}")
    count, every = num_patches // division, iterations // division
    events = [Event(k * every, count, "highest", "emit") for k in range(1, division)]
    left_over = num_patches - division * count
    if left_over:
        events.append(Event(iterations, left_over, "lowest", "drop"))
    return Schedule(num_patches, iterations, tuple(events))


def nothing(num_patches: int, iterations: int = 0) -> Schedule:
    """Gaussian noise: no iterations, the images are what they start from."""
    if iterations:
        raise InputError(f"gaussian images are noise and take no iterations, got {iterations}")
    return Schedule(num_patches, 0)


METHODS: dict[str, Callable[..., Schedule]] = {"dense": dense, "smi": sparse, "pri": patch_rebirth, "psaq": dense, "gaussian": nothing}


def make_schedule(method: str, num_patches: int, iterations: int, **options: Any) -> Schedule:
    """The schedule of a method by name; options are prune_at and prune_ratio (smi) and division (pri), None meaning the published value."""
    if method not in METHODS:
        raise InputError(f"unknown method '{method}': it must be one of {', '.join(METHODS)}")
    accepted = {"smi": ("prune_at", "prune_ratio"), "pri": ("division",)}.get(method, ())
    given = {name: value for name, value in options.items() if value is not None}
    foreign = sorted(given.keys() - set(accepted))
    if foreign:
        raise InputError(f"method '{method}' does not take {', '.join(foreign)}")
    return METHODS[method](num_patches, iterations, **given)
