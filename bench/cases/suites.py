"""What the suites measure: data. Cases come in the order of their importance, since a run that is short of time leaves out the last ones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from smi.inversion import schedules
from smi.inversion.methods import COMPARED, Method

from . import operations

TINY, SMALL, BASE = "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"
PATCHES = 196  # of these models at 224 pixels
ITERATIONS = schedules.PUBLISHED_ITERATIONS
METHODS = tuple((method.name, method.options) for method in COMPARED)
IMAGES = 112  # whole batches of 4 trajectories for v = 1, 2, 4 and 7
ALL_SIDES = ("ours", "compiled", "eager")
TWO_SIDES = ("ours", "eager")


@dataclass(frozen=True)
class StepCase:
    """One whole optimisation step. active: patches, None for all. options: of the model's constructor."""

    model: str
    batch: int
    active: int | None = None
    sides: tuple[str, ...] = TWO_SIDES
    options: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        short = self.model.replace("_patch16_224", "").replace("_", "-")
        more = "".join(f", {key} {value}" for key, value in self.options)
        return f"{short}, batch {self.batch}, {'all' if self.active is None else self.active} patches{more}"


@dataclass(frozen=True)
class WholeCase:
    """A whole run of a method: `images` finished images by batches of `batch` trajectories.

    lengths: iterations of the timed runs of one batch; two of them are extrapolated to ITERATIONS by the line through both, one that is ITERATIONS
    long is taken as it is. sides: "ours" and "eager".
    """

    model: str
    method: str
    division: int | None
    batch: int
    images: int
    lengths: tuple[int, ...]
    sides: tuple[str, ...] = TWO_SIDES

    @property
    def options(self) -> dict:
        return {} if self.division is None else {"division": self.division}

    @property
    def title(self) -> str:
        return Method(self.method, self.division).title

    @property
    def name(self) -> str:
        return f"{self.model.replace('_patch16_224', '').replace('_', '-')}, {self.title}, batch {self.batch}"


@dataclass(frozen=True)
class MemoryCase:
    model: str
    batch: int
    active: int | None = None
    sides: tuple[str, ...] = ("ours", "recompute", "eager")

    @property
    def name(self) -> str:
        return StepCase(self.model, self.batch, self.active).name


def stage_counts(patches: int = PATCHES) -> dict[str, list[int]]:
    """Active patches of every stage of every method: {"dense": [196], "SMI": [196, 137, ...], "PRI v=7": [196, 168, ...]}."""
    titles = [WholeCase("", method, options.get("division"), 1, 1, ()).title for method, options in METHODS]
    made = [schedules.make_schedule(method, patches, ITERATIONS, **options) for method, options in METHODS]
    return {title: [stage.active for stage in schedule.stages()] for title, schedule in zip(titles, made, strict=True)}


def final_smi(patches: int = PATCHES) -> int:
    """Patches that SMI retains: 46 of 196."""
    return stage_counts(patches)["SMI"][-1]


def steps(batches: dict[str, int], sides: tuple[str, ...] = ALL_SIDES) -> list[StepCase]:
    """Dense and the final SMI stage with all sides for every model, then every other stage of SMI and PRI."""
    keys = [(BASE, final_smi()), (TINY, final_smi()), (BASE, None), (TINY, None), (SMALL, final_smi()), (SMALL, None)]
    first = [StepCase(model, batches[model], active, sides) for model, active in keys]
    others = sorted({count for counts in stage_counts().values() for count in counts} - {PATCHES, final_smi()})
    return first + [StepCase(model, batches[model], active) for model in (TINY, BASE, SMALL) for active in others]


def scaling(batch: int, model: str = TINY) -> list[StepCase]:
    """Batch, tokens, depth and resolution, one varied at a time around `model` at `batch` with the final SMI patches."""
    n = final_smi()
    by_batch = [StepCase(model, size, n) for size in (1, batch // 2, 2 * batch)]
    by_tokens = [StepCase(model, batch, count) for count in (14, 98)]
    by_depth = [StepCase(model, batch, n, options=(("depth", depth),)) for depth in (2, 6, 24)]
    large = (("img_size", 384),)
    by_resolution = [StepCase(model, max(1, batch // 4), count, options=large) for count in (final_smi(24 * 24), None)]
    return list(dict.fromkeys(by_batch + by_tokens + by_depth + by_resolution))


def whole_on_cpu() -> list[WholeCase]:
    """Proportional lengths: SMI's events keep their proportions at multiples of 80 iterations, PRI's at multiples of v."""
    lengths = {"dense": (2, 6), "smi": (80, 160)}
    tiny = [WholeCase(TINY, m, o.get("division"), 4, IMAGES, lengths.get(m) or (o["division"], 3 * o["division"])) for m, o in METHODS]
    base = [WholeCase(BASE, "pri", 7, 4, IMAGES, (7, 21), ("ours",)), WholeCase(BASE, "dense", None, 4, IMAGES, (1, 3), ("eager",))]
    return [tiny[0], tiny[-1], *base, *tiny[1:-1]]


def whole_on_gpu() -> list[WholeCase]:
    """126 images: PRI v=7 measured in full, 18 trajectories at once; the others from 50 timed iterations or as many as their events need."""
    lengths = {"dense": (10, 60), "smi": (80, 160)}
    found = [WholeCase(BASE, "pri", 7, 18, 126, (ITERATIONS,), ("ours",)), WholeCase(BASE, "dense", None, 126, 126, lengths["dense"])]
    found += [WholeCase(BASE, "smi", None, 126, 126, lengths["smi"])]
    return found + [WholeCase(BASE, "pri", v, -(-126 // v), 126, (10 * v, 20 * v), ("ours",)) for v in (2, 4)]


@dataclass(frozen=True)
class Suites:
    """All that one command measures, with the share of its time that each suite may take."""

    steps: list[StepCase]
    whole: list[WholeCase]
    memory: list[MemoryCase]
    scaling: list[StepCase]
    operations: Sequence[operations.Case]
    shares = {"memory": 0.1, "steps": 0.5, "whole": 0.6, "scaling": 0.6, "operations": 1.0}  # of what is left, in this order


CPU_BATCHES = {TINY: 8, SMALL: 4, BASE: 4}
GPU_BATCHES = {TINY: 128, SMALL: 128, BASE: 128}


def on_cpu() -> Suites:
    memory = [MemoryCase(BASE, 8), MemoryCase(BASE, 8, final_smi()), MemoryCase(TINY, 8), MemoryCase(TINY, 8, final_smi())]
    return Suites(steps(CPU_BATCHES), whole_on_cpu(), memory, scaling(8), operations.cases(operations.CPU_BATCH))


def quick_on_cpu() -> Suites:
    n = final_smi()
    some = [StepCase(TINY, 8, n, ALL_SIDES), StepCase(BASE, 4, n), StepCase(TINY, 8), StepCase(BASE, 4)]
    whole = [case for case in whole_on_cpu() if case.model == TINY and (case.method == "dense" or case.division == 7)]
    return Suites(some, whole, [MemoryCase(TINY, 8)], [], [])


def on_gpu() -> Suites:
    memory = [MemoryCase(BASE, 128), MemoryCase(BASE, 128, final_smi()), MemoryCase(TINY, 128, final_smi())]
    return Suites(steps(GPU_BATCHES), whole_on_gpu(), memory, scaling(128), [])  # bench.gpu measures the operations


def names(cases: Iterable) -> list[str]:
    return [case.name for case in cases]
