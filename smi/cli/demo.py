"""`smi demo`."""

import json
from pathlib import Path

import click

from ..console import make_console, print_table
from ..demo import ITERATIONS, TRANSFER_STEPS, demo
from ..errors import RunInterrupted
from .options import AS_JSON, FORCE, PATH, SEED, options

WIDTH = 112  # characters that the table takes


@click.command("demo")
@options(
    click.option("--output", "-o", default=Path("out/demo"), type=PATH, help="Folder for images, table and report."),
    click.option("--iterations", default=ITERATIONS, help="Updates per batch."),
    click.option("--transfer-steps", default=TRANSFER_STEPS, help="Updates of each student; 0 for none."),
    SEED,
    FORCE,
    AS_JSON,
)
def command(output, iterations, transfer_steps, seed, force, as_json) -> None:
    """Invert the embedded digits teacher with every method and use the images: one table, one report."""
    try:
        result = demo(output, iterations=iterations, transfer_steps=transfer_steps, seed=seed, progress=not as_json, force=force)
    except KeyboardInterrupt:
        raise RunInterrupted(f"interrupted: what was finished is in the folders of {output}") from None
    print(json.dumps(result)) if as_json else print_demo(result)


def print_demo(result: dict) -> None:
    """The table, in two parts where the terminal is narrow."""
    rows = result["table"]
    title = "digits teacher, {images} images each, {iterations} iterations, batches of {batch_size} trajectories, a_tv {tv_weight:g}, {device}"
    title = title.format(images=rows[0]["images"], **result["settings"])
    cost = {
        "sparsity": ("sparsity", "{:.0%}"), "seconds": ("seconds", "{:.1f}"), "images/s": ("images_per_second", "{:.1f}"),
        "speed-up": ("speedup", "{:.2f}x"), "FLOPs\npredict": ("flops_speedup", "{:.2f}x"),
    }  # fmt: skip
    shares = {"teacher\nagrees": "agreement", "W8/A8": "w8a8", "W4/A8": "w4a8", "student": "transfer"}
    worth = {head: (name, "{:.1%}") for head, name in shares.items() if any(name in row for row in rows)}
    for columns in ({**cost, **worth},) if make_console().width >= WIDTH else (cost, worth):
        cells = [[row["method"], *(form.format(row[name]) if name in row else "" for name, form in columns.values())] for row in rows]
        print_table(title, ["method", *columns], cells, wrap=True)
        title = ""
    if "full" in result:
        print(f"on real test images: the teacher {result['full']:.1%}, quantised with the images of a row, and a student that learned from them")
    for note in result["notes"]:
        print(note)
    print(f"picture: {result['picture']}\nreport: {result['report']}")
