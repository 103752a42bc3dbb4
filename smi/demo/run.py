"""`smi demo`: images by every method, the table, the picture and the report."""

from dataclasses import asdict
from pathlib import Path

import torch

from ..datasets import load
from ..errors import InputError
from ..files import output_folder, write_json
from ..images.patches import to_patches
from ..images.sparse_images import SparseImages
from ..inversion.loop import invert
from ..models.vit import describe
from ..quantization.model import accuracy
from ..random_streams import generator
from ..report import picture_grid, rows_of, write_report
from ..report.runs import DEMO, FORMAT
from ..teachers import digits
from . import downstream
from .compare import ITERATIONS, METHODS, NUM_IMAGES, agreement, compare

BATCH_SIZE = 12  # the same for every method: total variation weighs more in larger batches
TV_WEIGHT = 5e-3
NOISE, REAL = "Gaussian noise", "real images"  # the controls: nothing was optimised


def demo(
    folder: str | Path,
    *,
    iterations: int = ITERATIONS,
    num_images: int = NUM_IMAGES,
    transfer_steps: int = downstream.TRANSFER_STEPS,
    seed: int = 0,
    progress: bool = True,
    force: bool = False,
) -> dict:
    """Invert the digits teacher with all methods, quantise it with the images of each and train a student on them; writes the images, demo.png,
    demo.json with the table, and report.html into folder.

    num_images: of each method. transfer_steps: updates of a student, 0 for none. Where scikit-learn (the real digits) or torchao is missing the
    columns that need it are left out, and the notes say so. Returns table, notes and paths as data. Raises InputError, before anything is made, where
    folder is not empty and not `force`.
    """
    if isinstance(transfer_steps, bool) or not isinstance(transfer_steps, int) or transfer_steps < 0:
        raise InputError(f"transfer_steps must be a whole number of at least 0, got {transfer_steps}")
    folder = output_folder(folder, force)
    teacher, common = digits(), {"force": force, "labels": range(10), "seed": seed, "progress": progress}
    options = {"iterations": iterations, "batch_size": BATCH_SIZE, "tv_weight": TV_WEIGHT}
    rows, made = compare(teacher, METHODS, num_images=num_images, output=folder, **options, **common)
    picture = picture_grid(_rows(made), folder / "demo.png", title="Digits synthesised from the embedded teacher, without data")
    table = [{**asdict(row), "folder": row.folder, "images_per_second": row.images_per_second} for row in rows]
    result = {"format": FORMAT, "table": table, "notes": [], "picture": str(picture), "settings": made["dense"].provenance}
    _write(result, folder)
    _judge(result, teacher, folder, num_images, transfer_steps, common)
    _write(result, folder)
    return {**result, "report": write_report(folder)["report"]}


def _judge(result: dict, teacher: torch.nn.Module, folder: Path, num_images: int, transfer_steps: int, common: dict) -> None:
    """Add the controls and what everything is worth on real test images, as far as the libraries for it are there."""
    try:
        real = load("digits", teacher, "test")
    except InputError as error:
        result["notes"].append(f"What the images are worth on real test images is left out: {error}.")
        return
    noise = invert(teacher, method="gaussian", num_images=num_images, output=folder / "gaussian", **common)
    control = real_images(teacher, num_images, common["seed"])
    control.save(folder / "real", force=common["force"])
    result["table"] += [_control(NOISE, "gaussian", noise, teacher), _control(REAL, "real", control, teacher)]
    folders = [folder / row["folder"] for row in result["table"]]
    found = downstream.judge_all(folders, transfer_steps=transfer_steps, seed=common["seed"], progress=common["progress"])
    for row in result["table"]:
        row.update({name: value for name, value in found[row["folder"]].items() if name != "notes"})
    result["notes"] += sorted({note for values in found.values() for note in values["notes"]})
    result.update(full=accuracy(teacher, *real), downstream=downstream.settings(transfer_steps))


def _control(title: str, name: str, images: SparseImages, teacher: torch.nn.Module) -> dict:
    """A row of what was not optimised."""
    return {"method": title, "folder": name, "sparsity": 0.0, "images": len(images), "agreement": agreement(teacher, images)}


def real_images(teacher: torch.nn.Module, count: int, seed: int) -> SparseImages:
    """Real digits of the training split, all patches kept."""
    pixels, labels = load("digits", teacher, "train")
    chosen = torch.randperm(len(pixels), generator=generator(seed, "real"))[:count]
    vit = describe(teacher)
    patches, numbers = to_patches(pixels[chosen], vit.patch_size), torch.arange(len(chosen))
    index = torch.arange(vit.num_patches).expand(len(chosen), -1).contiguous()
    about = {"method": "real", "model": vit.name, "data": "digits, training split", "seed": seed, "iterations": 0}
    return SparseImages(patches, index, labels[chosen], numbers, torch.zeros_like(numbers), vit.grid, vit.mean, vit.std, about)


def _write(result: dict, folder: Path) -> None:
    write_json(folder / DEMO, result)


def _rows(made: dict[str, SparseImages]) -> list[tuple[str, SparseImages]]:
    """Dense, SMI, and the stages of PRI v = 4, one digit a column."""
    return [
        ("dense", made["dense"][:10]),
        ("SMI", made["SMI"][:10]),
        *((f"PRI v=4, {name}", images) for name, images in rows_of(made["PRI v=4"], columns=10)),
    ]
