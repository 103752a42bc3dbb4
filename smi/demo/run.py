"""`smi demo`: images by every method, the table, the picture and the report."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..datasets import load
from ..errors import InputError
from ..files import output_folder, write_json
from ..images.patches import to_patches
from ..images.sparse_images import SparseImages
from ..inversion.loop import invert
from ..inversion.methods import DENSE, GAUSSIAN, PRI4, REAL, SMI, Method
from ..models.vit import describe
from ..quantization.model import accuracy
from ..random_streams import generator
from ..report import picture_grid, rows_of, write_report
from ..report.several_runs import DEMO, FORMAT
from ..teachers import digits
from . import downstream
from .compare import ITERATIONS, METHODS, NUM_IMAGES, agreement, compare

BATCH_SIZE = 12  # the same for every method: total variation weighs more in larger batches
TV_WEIGHT = 5e-3


def demo(
    folder: str | Path,
    *,
    iterations: int = ITERATIONS,
    num_images: int = NUM_IMAGES,
    transfer_steps: int = downstream.TRANSFER_STEPS,
    seed: int = 0,
    progress: bool = True,
    force: bool = False,
) -> dict[str, Any]:
    """Invert the digits teacher with all methods, quantise it with the images of each, and train a student on them.

    Writes the images, demo.png, demo.json with the table, and report.html into folder. num_images: of each method. transfer_steps: updates of a
    student, 0 for none. Where scikit-learn (the real digits) or torchao is missing, the columns that need it are left out, and the notes say so.
    Returns table, notes and paths as data. Raises InputError, before anything is made, where folder is not empty and not `force`.
    """
    if isinstance(transfer_steps, bool) or not isinstance(transfer_steps, int) or transfer_steps < 0:
        raise InputError(f"transfer_steps must be a whole number of at least 0, got {transfer_steps}")
    folder = output_folder(folder, force)
    teacher = digits()
    common: dict[str, Any] = {"force": force, "labels": range(10), "seed": seed, "progress": progress}
    options: dict[str, Any] = {"iterations": iterations, "batch_size": BATCH_SIZE, "tv_weight": TV_WEIGHT}
    rows, made = compare(teacher, METHODS, num_images=num_images, output=folder, **options, **common)
    picture = picture_grid(_picture_rows(made), folder / "demo.png", title="Digits synthesised from the embedded teacher, without data")
    table = [asdict(row) for row in rows]
    result = {"format": FORMAT, "table": table, "notes": [], "picture": str(picture), "settings": made[DENSE].provenance}
    write_json(folder / DEMO, result)
    _judge(result, teacher, folder, num_images, transfer_steps, common)
    write_json(folder / DEMO, result)
    return {**result, "report": write_report(folder)["report"]}


def _judge(result: dict, teacher: nn.Module, folder: Path, num_images: int, transfer_steps: int, common: dict) -> None:
    """Add the controls and what everything is worth on real test images, as far as the libraries for it are there."""
    try:
        real = load("digits", teacher, "test")
    except InputError as error:
        result["notes"].append(f"What the images are worth on real test images is left out: {error}.")
        return
    noise = invert(teacher, method=GAUSSIAN.name, num_images=num_images, output=folder / GAUSSIAN.key, **common)
    control = real_images(teacher, num_images, common["seed"])
    control.save(folder / REAL.key, force=common["force"])
    result["table"] += [_control_row(GAUSSIAN, noise, teacher), _control_row(REAL, control, teacher)]
    folders = [folder / row["folder"] for row in result["table"]]
    found = downstream.judge_all(folders, transfer_steps=transfer_steps, seed=common["seed"], progress=common["progress"])
    for row in result["table"]:
        row.update({name: value for name, value in found[row["folder"]].items() if name != "notes"})
    result["notes"] += sorted({note for values in found.values() for note in values["notes"]})
    result.update(full=accuracy(teacher, *real), downstream=downstream.settings(transfer_steps))


def _control_row(control: Method, images: SparseImages, teacher: nn.Module) -> dict:
    """A row of images that were not optimised."""
    return {"method": control.title, "folder": control.key, "sparsity": 0.0, "images": len(images), "agreement": agreement(teacher, images)}


def real_images(teacher: nn.Module, count: int, seed: int) -> SparseImages:
    """Real digits of the training split, all patches kept."""
    pixels, labels = load("digits", teacher, "train")
    chosen = torch.randperm(len(pixels), generator=generator(seed, "real"))[:count]
    vit = describe(teacher)
    patches, numbers = to_patches(pixels[chosen], vit.patch_size), torch.arange(len(chosen))
    index = torch.arange(vit.num_patches).expand(len(chosen), -1).contiguous()
    about = {"method": "real", "model": vit.name, "data": "digits, training split", "seed": seed, "iterations": 0}
    return SparseImages(patches, index, labels[chosen], numbers, torch.zeros_like(numbers), vit.grid, vit.mean, vit.std, about)


def _picture_rows(made: dict[Method, SparseImages]) -> list[tuple[str, SparseImages]]:
    """Dense, SMI, and the stages of PRI v = 4, one digit a column."""
    stages = [(f"{PRI4.title}, {stage}", images) for stage, images in rows_of(made[PRI4], columns=10)]
    return [*((method.title, made[method][:10]) for method in (DENSE, SMI)), *stages]
