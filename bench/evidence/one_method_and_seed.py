"""All that is found out about a method with a seed; each column is written to its cell.json as soon as it is known."""

import json
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

import smi
from smi.evaluate import recognition
from smi.files import write_json
from smi.images.forward import forward_sparse
from smi.quantization.int8 import products_saturate
from smi.quantization.model import recognised
from smi.quantization.recipe import CALIBRATION_IMAGES

from .columns import HOW, JUDGED_COLUMNS, ROWS, STUDENTS
from .compare import to_hex
from .config import Config
from .images import count_flops, invert, real_images, warm_up
from .students import transfer
from .teacher import real_data, teacher_of

EVALUATED_TOGETHER = 8  # images: what lies between two layers stays in the cache


def folder_of(folder: Path, row: str, seed: int) -> Path:
    """What is made with a method and a seed lies in it."""
    return folder / f"seed{seed}" / row


def read_columns(folder: Path, row: str, seed: int) -> dict:
    """What is known so far."""
    path = folder_of(folder, row, seed) / "cell.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_columns(folder: Path, row: str, seed: int, **columns) -> None:
    """Add columns to those that are known."""
    write_json(folder_of(folder, row, seed) / "cell.json", {**read_columns(folder, row, seed), **columns})


def find_out(config: Config, folder: Path, row: str, seed: int, columns: Sequence[str]) -> None:
    """The images and those columns, as far as they are not yet known."""
    torch.set_num_threads(config.threads)
    make_images(config, folder, row, seed)
    judge(config, folder, row, seed, columns)


def make_images(config: Config, folder: Path, row: str, seed: int) -> None:
    """The images, with the processor seconds that they took; a run that was killed starts again."""
    path = folder_of(folder, row, seed) / "images"
    if "seconds" in read_columns(folder, row, seed) and path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    warm_up(config, row)
    began = time.process_time()
    images = real_images(config, seed) if row == "real" else invert(config, row, seed)
    seconds = time.process_time() - began
    found = dict(zip(("gflops", "flops_ratio"), count_flops(config, row), strict=True)) if ROWS[row].optimised else {}
    images.save(path, force=True)
    write_columns(folder, row, seed, seconds=seconds, **found)
    print(f"seed {seed}  {ROWS[row].title}: {len(images)} images in {seconds:.1f} s", flush=True)


def judge(config: Config, folder: Path, row: str, seed: int, columns: Sequence[str] = JUDGED_COLUMNS) -> None:
    """What the images are worth: those columns that are not yet known."""
    images = smi.SparseImages.load(folder_of(folder, row, seed) / "images")
    known = read_columns(folder, row, seed)
    steps: dict[str, Callable[[], dict]] = {"agreement": lambda: _agreement(config, images), "full": lambda: _full(config, folder)}
    for name in HOW:
        steps[name] = partial(_quantised, config, images, name)
    for name in STUDENTS:
        steps[name] = partial(transfer, config, images, seed, name, folder_of(folder, row, seed) / name, folder)
    for name in columns:
        if name not in known:
            found = steps[name]()
            write_columns(folder, row, seed, **found)
            print(f"seed {seed}  {ROWS[row].title}: {name} {found[name]:.3f}", flush=True)


def _agreement(config: Config, images: smi.SparseImages) -> dict:
    with torch.no_grad():
        found = recognition(forward_sparse(teacher_of(config.teacher), images), images.labels)
    return {"agreement": found.agreement, "confidence": found.confidence}


def _full(config: Config, folder: Path) -> dict:
    """Of the teacher itself, found once for a folder."""
    path = folder / "full.json"
    if not path.exists():
        write_json(path, _judged(config, "full", teacher_of(config.teacher)))
    return json.loads(path.read_text())


def _judged(config: Config, name: str, model: nn.Module) -> dict:
    """Accuracy on the real test images, and which of them are recognised."""
    right = recognised(model, *real_data(config, "test"), EVALUATED_TOGETHER)
    return {name: right.double().mean().item(), f"{name}_right": to_hex(right), "test_images": len(right)}


def _quantised(config: Config, images: smi.SparseImages, name: str) -> dict:
    """The quantised teacher, calibrated with as many images as published, spread over trajectories and stages; integers, which is the fast way."""
    recipe, weights, activations = HOW[name]
    some = images[torch.linspace(0, len(images) - 1, min(CALIBRATION_IMAGES, len(images))).long()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = smi.quantize(teacher_of(config.teacher), some, weight_bits=weights, activation_bits=activations, recipe=recipe)
        return _judged(config, name, model if products_saturate() else model.int8())
