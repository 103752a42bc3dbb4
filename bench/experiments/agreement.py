"""Whether the engines make the same images: whole runs on the embedded teacher by the reference in float32 and float64, and by the fused engine.

    python -m bench.experiments.agreement      SMI and PRI v = 4, three seeds; each method appended to bench/results/<device>.jsonl when done
    python -m bench.experiments.agreement --methods "pri v=4" --images 252

Optimisation of noise amplifies rounding, so runs drift apart however small the difference: the reference in float64 beside the reference in float32
shows how far rounding alone carries. Final losses and agreement are means over trajectories, seeds and the last tenth of the iterations.
"""

import argparse
import statistics

from torch import nn

import smi
from smi.console import print_table
from smi.images.forward import forward_sparse
from smi.images.sparse_images import SparseImages
from smi.models.by_name import load_model

from ..tables.experiments import AGREEMENT
from ..tables.rows import measurements
from .result_rows import append_to_results, with_environment

SIDES = {
    "reference float32": {"engine": "reference", "dtype": "float32"},
    "reference float64": {"engine": "reference", "dtype": "float64"},
    "fused float32": {"engine": "fused", "dtype": "float32"},
    "fused bfloat16": {"engine": "fused", "dtype": "bfloat16"},
}
METHODS = {"smi": {"method": "smi"}, "pri v=4": {"method": "pri", "division": 4}}
BASE = "reference float32"


def one(teacher: nn.Module, method: dict, side: dict, iterations: int, images: int, seed: int) -> tuple[SparseImages, float, float]:
    """The images of a run, its mean loss over the last tenth, and the share that the teacher recognises."""
    losses: list[float] = []

    def keep(at) -> None:
        if at.iteration >= 0.9 * iterations:
            losses.append(at.loss)

    settings = {"num_images": images, "iterations": iterations, "labels": list(range(10)), "seed": seed, "progress": False, "on_iteration": keep}
    made = smi.invert(teacher, **method, **side, **settings)
    recognised = (forward_sparse(teacher, made).argmax(1) == made.labels).float().mean().item()
    return made, statistics.fmean(losses), recognised


def shared(a: SparseImages, b: SparseImages) -> float:
    """Share of the retained patches of b that a retains too, image by image."""
    same = [len(set(x) & set(y)) / len(x) for x, y in zip(a.index.tolist(), b.index.tolist(), strict=True)]
    return statistics.fmean(same)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=56)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--no-append", action="store_true", help="leave bench/results as it is")
    given = parser.parse_args(arguments)
    teacher, rows = load_model("digits"), []
    for name in given.methods:
        found = with_environment("agreement", compare(teacher, name, given))
        if not given.no_append:
            append_to_results(found)
        rows += found
    title = f"embedded teacher, {given.images} images, {given.iterations} iterations, {given.seeds} seeds; patches as by {BASE}"
    print_table(title, AGREEMENT.columns, [line for found in measurements(rows) for line in AGREEMENT.lines(found)])


def compare(teacher: nn.Module, name: str, given: argparse.Namespace) -> list[dict]:
    """A row for each engine."""
    runs: dict[str, list] = {side: [] for side in SIDES}
    for side, options in SIDES.items():
        for seed in range(given.seeds):
            runs[side].append(one(teacher, METHODS[name], options, given.iterations, given.images, seed))
            _, loss, recognised = runs[side][-1]
            print(f"{name} {side}, seed {seed}: loss {loss:.3f}, agreement {recognised:.1%}", flush=True)
    about = {"model": "digits", "iterations": given.iterations, "images": given.images, "seeds": given.seeds}
    rows = []
    for side, made in runs.items():
        patches = statistics.fmean(shared(a, b) for (a, _, _), (b, _, _) in zip(runs[BASE], made, strict=True))
        loss, recognised = (statistics.fmean(run[i] for run in made) for i in (1, 2))
        rows.append(about | {"method": name, "side": side, "same_patches": patches, "loss": loss, "agreement": recognised})
    return rows


if __name__ == "__main__":
    main()
