"""`smi cost`."""

import json

import click

from ..console import make_console, print_table
from ..cost import cost_table
from ..inversion.schedules import PUBLISHED_ITERATIONS
from .options import AS_JSON, MODEL, SCHEDULE, options, setting

EXPLANATION = """\
published rule: 384 x the forward multiply-adds with the last stage's tokens, patch embedding dense, attention's two GEMMs left out.
GFLOP/step: every GEMM of the reference engine, forward and backward to the pixels; floor: with the last block computed for CLS alone."""


@click.command("cost")
@options(MODEL, click.option("--method", help="dense, smi or pri; all of them when absent."), SCHEDULE, setting("batch_size"), AS_JSON)
def command(model, image_size, method, iterations, batch_size, as_json, **schedule) -> None:
    """FLOPs and memory of the methods: by the published rule, and counting every GEMM; and PRI's theorem."""
    found = cost_table(model, image_size, method, PUBLISHED_ITERATIONS if iterations is None else iterations, batch_size, schedule)
    print(json.dumps(found)) if as_json else print_cost(found)


def print_cost(found: dict) -> None:
    title = "{model}, {iterations} iterations: per step of one trajectory, per finished image; memory of {batch_size} trajectories".format(**found)
    columns = ("method", "patches", "published rule, GFLOPs", "GFLOP/step, mean", "last stage", "TFLOP/image", "floor", "speed-up")
    cells = []
    for row in found["rows"]:
        name = row["method"] if row["images_per_trajectory"] == 1 else f"{row['method']} v={row['images_per_trajectory']}"
        flops = (row["published_gflops"], row["step_gflops_mean"], row["step_gflops_last"], row["image_tflops"], row["floor_image_tflops"])
        memory = (row["memory_first_gib"], row["memory_last_gib"])
        patches = f"{row['patches_per_image']}/{found['patches']}"
        cells.append([name, patches, *map(_two_digits, flops), f"{row['speedup']:.2f}x", *map(_two_digits, memory)])
    print_table(title, (*columns, "GiB, first stage", "last"), cells, wrap=True)
    make_console().print(EXPLANATION)
    if found["theorem"]:
        print_theorem(found["theorem"])


def print_theorem(theorem: list[dict]) -> None:
    columns = ("v", "linear, PRI (v+1)/(2v^2)", "idealised SMI 1/v", "self-attention, PRI", "idealised SMI", "N/d", "PRI cheaper while N/d <")
    names = ("pri_linear", "smi_linear", "pri_attention", "smi_attention", "patches_over_dim", "bound")
    cells = [(t["division"], *(f"{t[name]:.4f}" for name in names)) for t in theorem]
    print_table("PRI's theorem: cost per finished image, dense = 1", columns, cells, wrap=True)


def _two_digits(value: float) -> str:
    return f"{value:.2f}"
