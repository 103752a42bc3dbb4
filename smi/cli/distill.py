"""`smi distill`."""

import json
from pathlib import Path

import click
from torch import nn

from ..console import print_table
from ..datasets import Sizes, load
from ..distillation.loop import Distilled, distill
from ..distillation.pool import Inversion
from ..distillation.students import make_student
from ..errors import InputError, RunInterrupted
from ..images.sparse_images import SparseImages
from ..models.by_name import load_model
from ..models.vit import describe
from .options import AS_JSON, FORCE, MODEL, PATH, SEED, WEIGHTS, options, setting

INVERSION = ("num_images", "method", "iterations", "prune_at", "prune_ratio", "division", "batch_size", "tv_weight")  # where there is no FOLDER
WITHOUT = "without FOLDER: "


@click.command("distill")
@options(
    click.argument("folder", required=False, type=PATH),
    click.option("--output", "-o", required=True, type=PATH, help="Folder for the student; a killed run goes on from it."),
    MODEL,
    WEIGHTS,
    click.option("--student", default="small", help="small, teacher (a copy of it), a timm architecture, or a folder with a model."),
    click.option("--student-checkpoint", type=PATH, help="Weights to start from; random ones when absent."),
    click.option("--fresh-blocks", type=int, help="student 'teacher': re-initialised blocks at its end, with norm and head; all when absent."),
    click.option("--preset", default="published", help="published (SGD) or adamw."),
    click.option("--steps", type=int, help="Updates; the preset's when absent, like the next ones."),
    click.option("--student-batch", type=int, help="Images per update."),
    click.option("--lr", type=float, help="Learning rate."),
    click.option("--temperature", type=float, help="Of the divergence."),
    click.option("--head-only", is_flag=True, default=None, help="Train the classifier alone (linear probe)."),
    click.option("--patch-dropout", type=float, help="Largest fraction of the retained patches that a step leaves out, from 0 up to 1."),
    click.option("--patience", type=int, help="Evaluations without a better one before the run ends."),
    click.option("--eval", "evaluation", help="Real images on which the student is measured: digits, cifar10 or a path."),
    click.option("--refresh-every", type=int, help="Without FOLDER: steps after which new images are made."),
    setting("num_images", "-n", prefix=WITHOUT, default=128),
    setting("method", prefix=WITHOUT, default="pri"),
    *(setting(name, prefix=WITHOUT) for name in INVERSION[2:]),
    SEED,
    FORCE,
    AS_JSON,
)
def command(folder, output, model, image_size, checkpoint, random_weights, as_json, **given) -> None:
    """Train a student on the images in FOLDER, or on images made as it learns; --model is the teacher."""
    teacher = load_model(model, checkpoint=checkpoint, random_weights=random_weights, image_size=image_size)
    try:
        result, about = run_distill(teacher, folder, output, progress=not as_json, **given)
    except KeyboardInterrupt:
        raise RunInterrupted(f"interrupted: the same command goes on from what is in {output}") from None
    print(json.dumps({"output": str(output), **result.record(), **about})) if as_json else print_distilled(result, output)


def run_distill(
    teacher: nn.Module, folder: Path | None, output: Path, *, student, student_checkpoint, fresh_blocks, preset, student_batch, evaluation,
    refresh_every, seed, force, progress, mean, std, **given,
) -> tuple[Distilled, dict]:  # fmt: skip
    """Images from a folder or an inversion, the student by name, real images by name; and as what those were read. given: settings of the inversion,
    then of the training."""
    if folder is not None and refresh_every is not None:
        raise InputError("refreshing makes the images itself: leave out the folder, or --refresh-every")
    inversion = {name: given.pop(name) for name in INVERSION} | {"mean": mean, "std": std}
    training = {**given, "batch_size": student_batch}
    learner = make_student(student, teacher, checkpoint=student_checkpoint, fresh_blocks=fresh_blocks, seed=seed)
    sizes = None if evaluation is None else Sizes.of(_reading(learner, teacher))
    real = None if evaluation is None or sizes is None else load(evaluation, sizes)
    images = Inversion(teacher, seed=seed, progress=progress, **_present(inversion)) if folder is None else SparseImages.load(folder)
    asked = {"preset": preset, "evaluation": real, "refresh_every": refresh_every, "seed": seed}
    result = distill(teacher, learner, images, output=output, force=force, progress=progress, **asked, **_present(training))
    return result, {} if sizes is None else {"evaluation": {"data": evaluation, "preprocessing": sizes.record()}}


def _present(options: dict) -> dict:
    """Those that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _reading(student: nn.Module, teacher: nn.Module):
    """Whose channels, size and statistics real images get: the student's own where it is a supported ViT, else the teacher's."""
    try:
        return describe(student)
    except InputError:
        return Sizes.of(teacher)


def print_distilled(result, output) -> None:
    """A learning curve of at most ten lines."""
    every = -(-len(result.curve) // 10)
    cells = []
    for row in result.curve[every - 1 :: every]:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        cells.append((row["step"], f"{row['loss']:.4f}", f"{row['kl']:.4f}", f"{row['agreement']:.1%}", accuracy))
    columns = ("step", "loss", "KL held out", "agrees with the teacher", "accuracy on real images")
    print_table("learning curve", columns, cells, wrap=True)
    real = "" if result.accuracy is None else f", {result.accuracy:.1%} of the real images recognised"
    ended = " (stopped early)" if result.stopped_early else ""
    print(f"{result.steps} steps{ended}; best at step {result.best['step']}{real}; student written to {output}")
