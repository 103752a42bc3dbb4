"""The published speed of the sparse methods, within each side: images per second of SMI and PRI over those of the same side's dense inversion.

    python -m bench.experiments.claims                     DeiT-Base, batch 4, ours, eager and compiled (ten minutes on two cores)
    python -m bench.experiments.claims --sides ours --rounds 15 --no-append

A round times the step at the patch count of every stage of every method, in an order that alternates. A method's time is that of its
stages, each step taken as often as the published schedule takes it. The ratio is formed in each round by itself, so that what slows the machine
slows both of its sides. Rows are appended to bench/results/<device>.jsonl, one for every side and method.
"""

import argparse
from collections.abc import Callable, Mapping

import torch

from smi.console import print_table
from smi.inversion.methods import DENSE, Method
from smi.inversion.schedules import make_schedule
from smi.kernels.timing import elapsed, quantiles

from ..cases.suites import ALL_SIDES, BASE, CPU_BATCHES, ITERATIONS, PATCHES
from ..sides.make import Step, build_model, make_step
from ..tables.experiments import CLAIMED, CLAIMS
from ..tables.rows import measurements
from .result_rows import append_to_results, with_environment

CALLS = 2  # of a step in a round that are timed


def stages_of(method: Method) -> list[tuple[int, int]]:
    """Active patches and iterations of every stage of the published run."""
    return [(stage.active, stage.stop - stage.start) for stage in make_schedule(method.name, PATCHES, ITERATIONS, **method.options).stages()]


def images_over_dense(method: Method, seconds: Mapping[int, float]) -> float:
    """Images per second of a method over those of dense inversion. seconds: of a step, by active patches."""
    whole = {each: sum(iterations * seconds[active] for active, iterations in stages_of(each)) for each in (DENSE, method)}
    images = make_schedule(method.name, PATCHES, ITERATIONS, **method.options).images_per_trajectory
    return images * whole[DENSE] / whole[method]


def measure(make: Callable[[int], Step], rounds: int) -> tuple[dict[Method, list[float]], Step]:
    """The ratios of every round by method, and the dense step. make: the step at a number of active patches."""
    counts = sorted({active for method in (DENSE, *CLAIMED) for active, _ in stages_of(method)})
    steps = {active: make(active) for active in counts}
    for step in steps.values():
        step()
    ratios: dict[Method, list[float]] = {method: [] for method in CLAIMED}
    for number in range(rounds):
        seconds = {}
        for active in counts[:: -1 if number % 2 else 1]:
            seconds[active] = elapsed(steps[active], torch.device("cpu"), CALLS, before=steps[active])  # as in a run, where the same step went before
        for method, found in ratios.items():
            found.append(images_over_dense(method, seconds))
    return ratios, steps[PATCHES]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BASE)
    parser.add_argument("--sides", nargs="+", choices=ALL_SIDES, default=ALL_SIDES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-append", action="store_true", help="leave bench/results as it is")
    given = parser.parse_args(arguments)
    model, batch = build_model(given.model, {}, torch.device("cpu")), CPU_BATCHES[given.model]
    rows = []
    for side in given.sides:
        torch._dynamo.reset()
        with torch._dynamo.config.patch(recompile_limit=64):  # one shape a stage
            ratios, step = measure(lambda active, side=side: make_step(side, model, batch, active), given.rounds)
        about = {"model": given.model, "batch": batch, "side": side, "resolved": step.resolved, "dtype": step.dtype, "rounds": given.rounds}
        rows += [about | {"method": method.title, "over_dense": list(quantiles(found))} for method, found in ratios.items()]
    rows = with_environment("claims", rows)
    if not given.no_append:
        append_to_results(rows)
    print_table(CLAIMS.title, CLAIMS.columns, [line for found in measurements(rows) for line in CLAIMS.lines(found)])


if __name__ == "__main__":
    main()
