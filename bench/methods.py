"""Whole inversions: seconds per finished image of dense, SMI and PRI, the same number of images, rounds of the methods in turn, medians.

`python -m bench.methods` measures DeiT-Tiny/16 at 224 with random weights (time does not depend on them) and appends its rows to
bench/results/<device>.jsonl.
"""

import argparse
import platform
import statistics

import torch

from smi.demo import compare
from smi.environment import info_table
from smi.inversion.methods import DENSE, PRI7, SMI
from smi.models.by_name import load_model

from .measuring.record import append, commit, results_file
from .sides.ours import ENGINE, run_dtype
from .tables.terminal import print_table

METHODS = (DENSE, SMI, PRI7)


def measure(model: str, num_images: int, iterations: int, batch_size: int, rounds: int) -> list[dict]:
    """One row per method: quantiles over rounds, in each of which every method runs once."""
    teacher = load_model(model, random_weights=model != "digits")
    all_rounds = []
    for number in range(rounds):
        rows, _ = compare(teacher, METHODS, num_images=num_images, iterations=iterations, batch_size=batch_size, seed=number)
        all_rounds.append(rows)
        print(f"round {number + 1}/{rounds}: " + ", ".join(f"{row.method} {row.seconds:.1f} s" for row in rows), flush=True)
    result = []
    for same in zip(*all_rounds, strict=True):
        per_image = sorted(row.seconds / row.images for row in same)
        first = same[0]
        result.append(
            {
                "method": first.method,
                "sparsity": first.sparsity,
                "images": first.images,
                "seconds_per_image": statistics.median(per_image),
                "seconds_per_image_least": per_image[0],
                "seconds_per_image_most": per_image[-1],
                "speedup": statistics.median(row.speedup for row in same),
                "flops_speedup": first.flops_speedup,
            }
        )
    return result


def conditions(model: str, iterations: int, batch_size: int, rounds: int) -> dict:
    """What a reader needs to know to compare the rows with others."""
    info = info_table()
    return {
        "model": model,
        "weights": "random" if model != "digits" else "trained",
        "iterations": iterations,
        "batch_size": batch_size,
        "rounds": rounds,
        "engine": ENGINE,
        "dtype": run_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "device": info["devices"][-1 if torch.cuda.is_available() else 0],
        "versions": info["versions"],
        **commit(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=14)
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    rows = measure(given.model, given.images, given.iterations, given.batch_size, given.rounds)
    under = conditions(given.model, given.iterations, given.batch_size, given.rounds)
    append(results_file(under["device"]["name"]), [{"kind": "method", **row, **under} for row in rows])
    print_table(
        "{model}, {weights} weights, {iterations} iterations, {batch_size} trajectories at a time".format(**under),
        ("method", "sparsity", "images", "seconds/image", "speed-up", "FLOPs predict"),
        [
            (
                row["method"],
                f"{row['sparsity']:.0%}",
                row["images"],
                f"{row['seconds_per_image']:.3f}",
                f"{row['speedup']:.2f}x",
                f"{row['flops_speedup']:.2f}x",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
