"""The command `smi`. Errors are one sentence on stderr: exit code 2 for what was asked, 1 for what failed, 130 after Ctrl-C."""

import json
import sys
from pathlib import Path

import click

from ..demo import ITERATIONS as DEMO_ITERATIONS
from ..demo import TRANSFER_STEPS as DEMO_TRANSFER_STEPS
from ..errors import InputError, RunError
from ..inversion.losses import TV_WEIGHT
from ..inversion.schedules import PUBLISHED_ITERATIONS
from ..inversion.settings import BATCH_SIZE
from ..inversion.snapshots import SNAPSHOTS
from ..kernels.dispatch import BackendUnavailable, backend
from .types import Fractions, Numbers, Size

HELP = {"help_option_names": ["-h", "--help"], "show_default": True}

MODEL = [
    click.option("--model", default="digits", help="timm architecture, or 'digits' for the embedded teacher."),
    click.option("--image-size", type=Size(), help="Pixels, where it is not the architecture's own."),
]
WEIGHTS = [
    click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights to load: .safetensors, or .pth read as plain tensors."),
    click.option("--random-weights", is_flag=True, help="Use untrained weights (to measure time)."),
    click.option("--mean", type=Fractions(), help="Mean of the training images per channel, fractions of white; the model's own when absent."),
    click.option("--std", type=Fractions(), help="Their standard deviation."),
]
SCHEDULE = [
    click.option("--iterations", type=int, help=f"Updates per batch; as published when absent: {PUBLISHED_ITERATIONS}, psaq 1000, gaussian none."),
    click.option("--prune-at", type=Numbers(), help="smi: iterations of the prune events; the published ones, scaled, when absent."),
    click.option("--prune-ratio", type=float, help="smi: share of the active patches dropped at each event; 0.3 when absent."),
    click.option("--division", type=int, help="pri: images per trajectory; 7 when absent."),
]
BATCH = click.option("--batch-size", default=BATCH_SIZE, help="Trajectories optimised together.")
SEED = click.option("--seed", default=0, help="Of everything drawn.")
FORCE = click.option("--force", is_flag=True, help="Replace what was written to the output folder before.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def options(*groups):
    """Several options, or lists of them, as one decorator."""
    flat = [option for group in groups for option in (group if isinstance(group, list) else [group])]

    def decorate(function):
        for option in reversed(flat):
            function = option(function)
        return function

    return decorate


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        backend()  # a wrong SMI_BACKEND is said before anything is made
        smi.main(arguments or ["--help"], prog_name="smi", standalone_mode=False)
        return 0
    except RunInterrupted as error:
        return _fail(str(error), 130)
    except click.ClickException as error:
        return _fail(" ".join(error.format_message().split()), 2)
    except (InputError, BackendUnavailable) as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", 130)
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1)
    except Exception as error:  # a fault of ours or of a library: still one sentence, and how to see the rest
        if "--traceback" in arguments:
            raise
        return _fail(f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]} (smi --traceback ... shows where)", 1)


def _fail(message: str, code: int) -> int:
    print(f"smi: {message}", file=sys.stderr)
    return code


def _kept(batches: list, output: Path) -> str:
    from ..images.storage import images_in

    if not batches:
        return "no batch was finished, nothing was written"
    return f"{images_in(output)} finished images are in {output}"  # one batch more, where the run stopped between writing and telling


class RunInterrupted(Exception):
    """Ctrl-C in the middle of a run; the message says what was kept."""


@click.group(context_settings=HELP)
@click.option("--traceback", is_flag=True, help="Show where an unexpected error came from.")
def smi(traceback) -> None:
    """Data-free inversion of Vision Transformers: dense, sparse (SMI) and patch rebirth (PRI)."""


@smi.command()
@options(
    click.option(
        "--output", "-o", required=True, type=click.Path(path_type=Path), help="Folder for the images; every finished batch is written at once."
    ),
    click.option("--num-images", "-n", default=32, help="Finished images."),
    MODEL,
    WEIGHTS,
    click.option("--method", default="pri", help="dense, smi, pri, psaq, or gaussian (noise)."),
    SCHEDULE,
    BATCH,
    click.option("--losses", type=click.Choice(["default", "psaq"]), help="psaq: PSAQ-ViT's with any method; the method's own when absent."),
    click.option("--labels", type=Numbers(), help="Classes to invert, cycled; drawn from the seed when absent."),
    click.option("--importance", default="cls_attention", help="cls_attention or random."),
    click.option("--tv-weight", type=float, help=f"Weight of the total variation; {TV_WEIGHT:g} when absent."),
    click.option("--flip/--no-flip", default=None, help="Whether mirror images keep their class; the model's own when absent."),
    click.option("--engine", help="fused or reference; fused where it can when absent."),
    click.option("--dtype", default="auto", help="auto, float32, bfloat16, float16 or, by the reference, float64."),
    click.option("--update", default="active", help="active: patches that left stay as they are; all: every pixel goes on moving, as published."),
    click.option("--recompute", is_flag=True, help="Keep five ninths of the memory for the backward pass, for a sixth more FLOPs."),
    click.option("--max-memory", type=float, help="GiB beside the weights: batches run in as many parts as that takes."),
    SEED,
    click.option("--device", help="cpu, cuda, cuda:1, ...; a GPU where there is one when absent."),
    click.option("--snapshots", default=SNAPSHOTS, help="Of the first image, kept beside the images for smi report; 0 for none."),
    FORCE,
    AS_JSON,
)
def invert(output, model, image_size, checkpoint, random_weights, as_json, **settings) -> None:
    """Synthesise images from a trained ViT."""
    from ..inversion.loop import invert as synthesise
    from ..models.by_name import load_model

    batches = []
    teacher = load_model(model, checkpoint=checkpoint, random_weights=random_weights, image_size=image_size)
    try:
        images = synthesise(teacher, output=output, on_batch=batches.append, progress=not as_json, **settings)
    except KeyboardInterrupt:
        raise RunInterrupted(f"interrupted: {_kept(batches, output)}") from None
    except RunError as error:
        raise RunError(f"{error}; {_kept(batches, output)}") from error
    if as_json:
        print(json.dumps({"output": str(output), "images": len(images), "sparsity": images.sparsity, "provenance": images.provenance}))
    else:
        print(f"{images} written to {output}; look at them with: smi show {output}")


FOLDER = click.argument("folder", type=click.Path(path_type=Path))


@smi.command()
@options(
    FOLDER,
    click.option("--output", "-o", type=click.Path(path_type=Path), help="The PNG to write; FOLDER/grid.png, replaced, when absent."),
    click.option("--columns", default=10, type=click.IntRange(1, 100), help="Images side by side."),
    click.option("--force", is_flag=True, help="Replace the PNG if it is there."),
    AS_JSON,
)
def show(folder, output, columns, force, as_json) -> None:
    """Draw a grid of the images in FOLDER: dropped patches grey, PRI's stages in rows."""
    from ..images.sparse_images import SparseImages
    from ..report import picture_grid, rows_of

    if output is not None and output.exists() and not force:
        raise InputError(f"{output} exists: choose another name, or pass --force to replace it")
    images = SparseImages.load(folder)
    source = images.provenance
    patches = f"{images.index.shape[1]} of {images.grid[0] * images.grid[1]} patches"
    title = f"{source.get('method', '')} inversion of {source.get('model', 'a ViT')}, {patches}"
    path = picture_grid(rows_of(images, columns), output or folder / "grid.png", title=title)
    print(json.dumps({"picture": str(path), "images": len(images)}) if as_json else f"picture written to {path}")


@smi.command()
@options(
    FOLDER,
    click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder for report.html and the pictures; FOLDER when absent."),
    click.option("--model", help="Who judges the images, as in the other commands; the model they came from where it is 'digits' when absent."),
    click.option("--checkpoint", type=click.Path(path_type=Path), help="Its weights; without --model those of the model that the images name."),
    AS_JSON,
)
def report(folder, output, model, checkpoint, as_json) -> None:
    """Show what FOLDER holds, images, several folders of them, a demo or evidence, on one HTML page."""
    from ..report import write_report

    result = write_report(folder, output, model=model, checkpoint=checkpoint)
    print(json.dumps(result) if as_json else f"report written to {result['report']}, its {len(result['pictures'])} pictures beside it")


@smi.command()
@options(
    FOLDER,
    click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Folder for the exported files."),
    click.option("--to", default="png", type=click.Choice(["png", "webdataset"])),
    click.option("--shard-images", default=1000, help="webdataset: images per shard."),
    FORCE,
    AS_JSON,
)
def export(folder, output, to, shard_images, force, as_json) -> None:
    """Write the images in FOLDER as PNG files or as WebDataset shards."""
    from ..images.export import export_png, export_webdataset
    from ..images.sparse_images import SparseImages

    images = SparseImages.load(folder)
    paths = export_png(images, output, force=force) if to == "png" else export_webdataset(images, output, shard_images=shard_images, force=force)
    result = {"output": str(output), "images": len(images), "files": len(paths)}
    print(json.dumps(result) if as_json else f"{len(images)} images in {len(paths)} files written to {output}")


@smi.command()
@options(
    click.argument("folder", required=False, type=click.Path(path_type=Path)),
    click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Folder for the student; a killed run goes on from it."),
    MODEL,
    WEIGHTS,
    click.option("--student", default="small", help="small, teacher (a copy of it), a timm architecture, or a folder with a model."),
    click.option("--student-checkpoint", type=click.Path(path_type=Path), help="Weights to start from; fresh ones when absent."),
    click.option("--fresh-blocks", type=int, help="student 'teacher': blocks at its end that start afresh, with norm and head; all when absent."),
    click.option("--preset", default="published", help="published (SGD) or adamw."),
    click.option("--steps", type=int, help="Updates; the preset's when absent, like the next ones."),
    click.option("--student-batch", "batch", type=int, help="Images per update."),
    click.option("--lr", type=float, help="Learning rate."),
    click.option("--temperature", type=float, help="Of the divergence."),
    click.option("--head-only", is_flag=True, default=None, help="Train the classifier alone."),
    click.option("--patch-dropout", type=float, help="Largest share of the retained patches that a step leaves out, from 0 up to 1."),
    click.option("--patience", type=int, help="Evaluations without a better one before the run ends."),
    click.option("--eval", "evaluation", help="Real images on which the student is measured: digits, cifar10 or a path."),
    click.option("--refresh-every", type=int, help="Without FOLDER: make new images every so many steps."),
    click.option("--num-images", "-n", default=128, help="Without FOLDER: images made at a time."),
    click.option("--method", default="pri", help="Without FOLDER: dense, smi or pri."),
    SCHEDULE,
    BATCH,
    click.option("--tv-weight", type=float, help=f"Without FOLDER: weight of the total variation; {TV_WEIGHT:g} when absent."),
    SEED,
    FORCE,
    AS_JSON,
)
def distill(folder, output, model, image_size, checkpoint, random_weights, mean, std, force, as_json, **settings) -> None:
    """Train a student on the images in FOLDER, or on images made as it learns; --model is the teacher."""
    from ..models.by_name import load_model
    from .distill import run_distill
    from .tables import print_distilled

    teacher = load_model(model, checkpoint=checkpoint, random_weights=random_weights, image_size=image_size)
    try:
        result = run_distill(teacher, folder, output, force=force, progress=not as_json, mean=mean, std=std, **settings)
    except KeyboardInterrupt:
        raise RunInterrupted(f"interrupted: the same command goes on from what is in {output}") from None
    print(json.dumps({"output": str(output), **result.record()})) if as_json else print_distilled(result, output)


@smi.command()
@options(
    FOLDER,
    MODEL,
    WEIGHTS,
    click.option("--verifier", help="Another model that judges the images: a timm architecture, 'digits', or a folder with a model."),
    click.option("--verifier-checkpoint", type=click.Path(path_type=Path), help="Its weights; timm's pretrained ones when absent."),
    click.option("--against", help="Real images to compare with: digits, cifar10 or a path."),
    SEED,
    AS_JSON,
)
def evaluate(folder, model, image_size, checkpoint, random_weights, mean, std, verifier, verifier_checkpoint, against, seed, as_json) -> None:
    """Judge the images in FOLDER: by the model they came from, stage by stage, by another model, and beside real images."""
    from ..datasets import load
    from ..evaluate import evaluate as judge
    from ..images.sparse_images import SparseImages
    from ..models.by_name import load_model
    from ..models.vit import describe
    from .tables import print_evaluation

    images = SparseImages.load(folder)
    teacher = load_model(model, checkpoint=checkpoint, random_weights=random_weights, image_size=image_size)
    other = None if verifier is None else load_model(verifier, checkpoint=verifier_checkpoint)
    real = None if against is None else load(against, describe(teacher, mean=mean, std=std), "test")
    result = judge(images, teacher, verifier=other, real=real, seed=seed)
    print(json.dumps(result.record())) if as_json else print_evaluation(result, folder)


@smi.command()
@options(
    click.option("--images", required=True, help="A folder of sparse images; or digits, cifar10 or a path: real ones of the training split."),
    click.option("--w-bits", "weight_bits", default=8, help="Bits of the weights, 2 to 8."),
    click.option("--a-bits", "activation_bits", default=8, help="Bits of the activations, 2 to 8."),
    click.option("--eval", "evaluation", help="Real images on which accuracy is measured: digits, cifar10 or a path."),
    click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder for the model: int8 where both are 8 bits, else the simulation."),
    MODEL,
    WEIGHTS,
    click.option("--num-images", "-n", type=int, help="Images to calibrate with, the first ones; all when absent."),
    click.option("--ranges", default="minmax", help="Of the activations: minmax, percentile or mse."),
    click.option("--percentile", default=99.9, help="--ranges percentile: so many percent above the lower end, as many below the upper."),
    click.option("--weight-ranges", default="minmax", help="minmax or mse."),
    click.option("--attention", is_flag=True, help="Quantise both sides of attention's two products as well."),
    FORCE,
    AS_JSON,
)
def quantize(images, model, image_size, checkpoint, random_weights, as_json, **settings) -> None:
    """Quantise a ViT, calibrated with synthetic images."""
    from ..models.by_name import load_model
    from .quantize import print_quantized, run_quantize

    teacher = load_model(model, checkpoint=checkpoint, random_weights=random_weights, image_size=image_size)
    result = run_quantize(teacher, images, **settings)
    print(json.dumps(result)) if as_json else print_quantized(result)


@smi.command()
@options(MODEL, click.option("--method", help="dense, smi or pri; all of them when absent."), SCHEDULE, BATCH, AS_JSON)
def cost(model, image_size, method, iterations, batch_size, as_json, **settings) -> None:
    """FLOPs and memory of the methods, by the published rule and honestly, and PRI's theorem."""
    from .tables import cost_table, print_cost

    table = cost_table(model, image_size, method, PUBLISHED_ITERATIONS if iterations is None else iterations, batch_size, settings)
    print(json.dumps(table)) if as_json else print_cost(table)


@smi.command()
@options(AS_JSON)
def info(as_json) -> None:
    """Versions, devices, and which version of each kernel is available and why others are not."""
    from ..environment import info_table
    from .tables import print_info

    table = info_table()
    print(json.dumps(table)) if as_json else print_info(table)


@smi.command()
@options(click.option("--device", default="cuda", help="The GPU to check."), AS_JSON)
def verify(device, as_json) -> None:
    """Check every GPU version of every kernel on this GPU against the reference, time it, and keep the verdicts."""
    import torch

    from ..kernels.dispatch import verify as check
    from .tables import print_verdicts

    if not torch.cuda.is_available() or torch.device(device).type != "cuda":
        raise InputError(f"verify needs a CUDA GPU, '{device}' is none here: on the CPU the tests check every kernel")
    verdicts = [verdict._asdict() for verdict in check(device)]
    print(json.dumps(verdicts)) if as_json else print_verdicts(verdicts)


@smi.command()
@options(
    click.option("--output", "-o", default=Path("out/demo"), type=click.Path(path_type=Path), help="Folder for images, table and report."),
    click.option("--iterations", default=DEMO_ITERATIONS, help="Updates per batch."),
    click.option("--transfer-steps", default=DEMO_TRANSFER_STEPS, help="Updates of each student; 0 for none."),
    SEED,
    FORCE,
    AS_JSON,
)
def demo(output, iterations, transfer_steps, seed, force, as_json) -> None:
    """Invert the embedded digits teacher with every method and use the images: one table, one report."""
    from ..demo import demo as run_demo
    from .tables import print_demo

    try:
        result = run_demo(output, iterations=iterations, transfer_steps=transfer_steps, seed=seed, progress=not as_json, force=force)
    except KeyboardInterrupt:
        raise RunInterrupted(f"interrupted: what was finished is in the folders of {output}") from None
    print(json.dumps(result)) if as_json else print_demo(result)
