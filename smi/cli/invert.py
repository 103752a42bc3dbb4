"""`smi invert`."""

import json
from pathlib import Path

import click

from ..errors import RunError, RunInterrupted
from ..images.storage import MANIFEST, RUN, images_in
from ..inversion.loop import invert
from ..inversion.progress import log_to
from ..models.by_name import load_model
from .options import AS_JSON, FORCE, MODEL, PATH, SCHEDULE, SEED, WEIGHTS, options, setting


@click.command("invert")
@options(
    setting("output", "-o", type=PATH, required=True),
    setting("num_images", "-n", default=32),
    MODEL,
    WEIGHTS,
    setting("method", default="pri"),
    SCHEDULE,
    *(setting(name) for name in ("batch_size", "labels", "importance", "tv_weight", "flip", "engine", "dtype", "update", "recompute")),
    setting("losses", type=click.Choice(["default", "psaq"])),
    setting("max_memory"),
    SEED,
    setting("device"),
    setting("snapshots"),
    setting("checkpoint_every"),
    setting("label"),
    click.option("--log", type=PATH, help="JSON lines of the progress, appended to this file."),
    FORCE,
    AS_JSON,
)
def command(output, model, image_size, checkpoint, random_weights, log, as_json, **settings) -> None:
    """Synthesise images from a trained ViT, or with --method dense from any classifier."""
    teacher = load_model(model, checkpoint=checkpoint, random_weights=random_weights, image_size=image_size)
    try:
        with log_to(log) as on_iteration:
            images = invert(teacher, output=output, progress=not as_json, on_iteration=on_iteration, **settings)
    except KeyboardInterrupt:
        raise RunInterrupted(f"interrupted: {_kept(output)}") from None
    except RunError as error:
        raise RunError(f"{error}; {_kept(output)}") from error
    if as_json:
        print(json.dumps({"output": str(output), "images": len(images), "sparsity": images.sparsity, "provenance": images.provenance}))
    else:
        print(f"{images} written to {output}; look at them with: smi show {output}")


def _kept(output: Path) -> str:
    if not (output / MANIFEST).is_file():
        return "no batch was finished" + ("; the same command goes on within the first" if (output / RUN).is_file() else ", nothing was written")
    return f"{images_in(output)} finished images are in {output}; the same command goes on"
