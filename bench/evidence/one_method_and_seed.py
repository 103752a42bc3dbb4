"""One cell of the evidence: a method and a seed. Each column is written as soon as it is known."""

import copy
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import smi
from smi import cost
from smi.datasets import load
from smi.distillation import partly_fresh, small_student
from smi.engine.reference import forward
from smi.errors import InputError
from smi.evaluate import recognition
from smi.files import write_json
from smi.images.forward import forward_sparse
from smi.images.patches import to_patches
from smi.inversion.schedules import Schedule, make_schedule
from smi.models.by_name import load_model
from smi.models.folder import DESCRIPTION, architecture, build, load_model_folder, save_model
from smi.models.vit import describe
from smi.quantization import accuracy
from smi.random_streams import generator

from .learning import learn

ROWS = ("gaussian", "dense", "psaq", "smi", "pri2", "pri4", "pri7", "real")
LONGEST_FIRST = ("psaq", "dense", "real", "gaussian", "pri2", "smi", "pri4", "pri7")
TITLES = dict(zip(ROWS, ("Gaussian noise", "dense", "PSAQ-ViT", "SMI", "PRI v=2", "PRI v=4", "PRI v=7", "real images"), strict=True))
WIDTHS = ((8, 8), (4, 8), (4, 4), (4, 3))  # weights, activations: the published ones, then where the rows differ
CALIBRATION = 32  # images, as published
QUANTISED = tuple(f"w{weights}a{activations}" for weights, activations in WIDTHS)
STUDENTS = ("copy", "small", "trunk")
JUDGED = ("agreement", "full", *QUANTISED, *STUDENTS)
COLUMNS = ("seconds", "gflops", "flops_ratio", *JUDGED)
HEADINGS = {
    **{name: name.upper().replace("A", "/A") for name in QUANTISED},
    "seconds": "core-seconds",
    "speedup": "speed-up",
    "gflops": "GFLOP/image",
    "flops_ratio": "of model",
    "agreement": "agreement",
    "full": "float32",
    "copy": "copy",
    "small": "small",
    "trunk": "trunk",
}
UNITS = {"seconds": (1.0, 1), "speedup": (1.0, 2), "gflops": (1.0, 2), "flops_ratio": (1.0, 3)}  # factor and decimals; per cent for the others
CURVE_POINTS = 10


def place(folder: Path, row: str, seed: int) -> Path:
    return folder / f"seed{seed}" / row


def read(folder: Path, row: str, seed: int) -> dict:
    """What is known of a cell."""
    path = place(folder, row, seed) / "cell.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(folder: Path, row: str, seed: int, **columns) -> dict:
    cell = {**read(folder, row, seed), **columns}
    write_json(place(folder, row, seed) / "cell.json", cell)
    return cell


@cache
def teacher_of(name: str) -> nn.Module:
    return load_model(name)


@cache
def real(config, split: str) -> tuple[Tensor, Tensor]:
    """Real images as the teacher takes them."""
    limit = config.test_images if split == "test" else None
    return load(config.data, teacher_of(config.teacher), split, limit)


def options(config, row: str) -> dict:
    """Settings of smi.invert for a row."""
    method = "pri" if row.startswith("pri") else row
    made = {"method": method, "num_images": config.images, "batch_size": config.batch_size, "progress": False}
    if row != "gaussian":
        made["iterations"] = config.iterations
    if row not in ("gaussian", "psaq"):  # PSAQ brings its own total variation
        made["tv_weight"] = config.tv_weight
    if method == "pri":
        made["division"] = int(row[3:])
    if row != "gaussian":
        made["engine"] = "reference" if row == "psaq" else config.engine
    return made


def schedule_of(config, row: str) -> Schedule:
    vit = describe(teacher_of(config.teacher))
    given = {"division": int(row[3:])} if row.startswith("pri") else {}
    return make_schedule("pri" if given else "dense" if row == "psaq" else row, vit.num_patches, config.iterations, **given)


def flops(config, row: str) -> tuple[float, float]:
    """GFLOP of the ViT per finished image as PyTorch counts those of every stage, and their ratio to the cost model."""
    vit, schedule = describe(teacher_of(config.teacher)).to("meta", torch.float32), schedule_of(config, row)
    counted = 0
    for stage in schedule.stages():
        images = torch.empty(1, vit.channels, *vit.image_size, device="meta", requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            logits = forward(vit, images, torch.empty(1, stage.active, device="meta", dtype=torch.int64)).logits
            torch.autograd.grad(logits.sum(), images)
        counted += (stage.stop - stage.start) * counter.get_total_flops()
    per_image = counted / schedule.images_per_trajectory
    return per_image / 1e9, per_image / cost.image_flops(vit, schedule)


def work(config, folder: Path, row: str, seed: int, columns: Sequence[str]) -> None:
    """All of a cell that is not yet known."""
    torch.set_num_threads(config.threads)
    make_images(config, folder, row, seed)
    judge(config, folder, row, seed, columns)


def make_images(config, folder: Path, row: str, seed: int) -> None:
    """The images of a cell, with the processor seconds they took; a run that was killed starts again."""
    path = place(folder, row, seed) / "images"
    if "seconds" in read(folder, row, seed) and path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _warm_up(config, row)
    began = time.process_time()
    images = real_images(config, seed) if row == "real" else _inverted(config, row, seed)
    seconds = time.process_time() - began
    found = {} if row in ("real", "gaussian") else dict(zip(("gflops", "flops_ratio"), flops(config, row), strict=True))
    images.save(path, force=True)
    write(folder, row, seed, seconds=seconds, **found)
    print(f"seed {seed}  {TITLES[row]}: {len(images)} images in {seconds:.1f} s", flush=True)


@cache
def _warm_up(config, row: str) -> None:
    """What the first images of a process would pay for: imports, the teacher, the engine's buffers."""
    if row == "real":
        real(config, "train")
    else:
        _inverted(replace(config, images=1, iterations=7, batch_size=1), row, 0)


def _inverted(config, row: str, seed: int) -> smi.SparseImages:
    teacher = teacher_of(config.teacher)
    classes = describe(teacher).num_classes
    return smi.invert(teacher, labels=range(classes), seed=seed, **options(config, row))


def real_images(config, seed: int) -> smi.SparseImages:
    """As many images of the training split, all patches kept."""
    images, labels = real(config, "train")
    chosen = torch.randperm(len(images), generator=generator(seed, "real"))[: config.images]
    vit = describe(teacher_of(config.teacher))
    patches, numbers = to_patches(images[chosen], vit.patch_size), torch.arange(len(chosen))
    index = torch.arange(vit.num_patches).expand(len(chosen), -1).contiguous()
    return smi.SparseImages(patches, index, labels[chosen], numbers, torch.zeros_like(numbers), vit.grid, vit.mean, vit.std, {"method": "real"})


def judge(config, folder: Path, row: str, seed: int, columns: Sequence[str] = JUDGED) -> None:
    """Those columns of a cell that are not yet known."""
    images = smi.SparseImages.load(place(folder, row, seed) / "images")
    known = read(folder, row, seed)
    steps: dict[str, Callable[[], dict]] = {"agreement": lambda: _agreement(config, images), "full": lambda: _full(config)}
    for name, (weights, activations) in zip(QUANTISED, WIDTHS, strict=True):
        steps[name] = partial(_quantised, config, images, weights, activations, name)
    for name in STUDENTS:
        steps[name] = partial(_transfer, config, folder, row, images, seed, name)
    for name in columns:
        if name not in known:
            found = steps[name]()
            write(folder, row, seed, **found)
            print(f"seed {seed}  {TITLES[row]}: {name} {found[name]:.3f}", flush=True)


def _agreement(config, images: smi.SparseImages) -> dict:
    with torch.no_grad():
        found = recognition(forward_sparse(teacher_of(config.teacher), images), images.labels)
    return {"agreement": found.agreement, "confidence": found.confidence}


def _full(config) -> dict:
    return {"full": accuracy(teacher_of(config.teacher), *real(config, "test"))}


def _quantised(config, images: smi.SparseImages, weights: int, activations: int, name: str) -> dict:
    """The quantised teacher, calibrated with as many images as published, spread over trajectories and stages."""
    some = images[torch.linspace(0, len(images) - 1, min(CALIBRATION, len(images))).long()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = smi.quantize(teacher_of(config.teacher), some, weight_bits=weights, activation_bits=activations)
        return {name: accuracy(model, *real(config, "test"))}


def _transfer(config, folder: Path, row: str, images: smi.SparseImages, seed: int, kind: str) -> dict:
    """Accuracy on real test images of a student, and its learning curve."""
    teacher, evaluation = teacher_of(config.teacher), real(config, "test")
    if kind == "copy":
        student, steps, given = partly_fresh(teacher, config.fresh_blocks, seed), config.copy_steps, {}
    elif kind == "small":
        student, steps, given = small_student(teacher, seed), config.small_steps, {}
    else:
        student, steps, given = trunk(config, folder), config.trunk_steps, {"head_only": True, "lr": 0.1, "patch_dropout": 0.0}
        teacher, images, evaluation = _later_classes(teacher, images, evaluation)
    result = smi.distill(
        teacher,
        student,
        images,
        preset="adamw",
        steps=steps,
        batch_size=config.student_batch,
        eval_every=max(1, steps // CURVE_POINTS),
        evaluation=evaluation,
        output=place(folder, row, seed) / kind,
        progress=False,
        seed=seed,
        **given,
    )
    curve = [{name: point[name] for name in ("step", "seconds", "kl", "accuracy")} for point in result.curve]
    return {kind: result.accuracy, f"{kind}_curve": curve}


def _later_classes(teacher: nn.Module, images: smi.SparseImages, evaluation: tuple[Tensor, Tensor]):
    """The teacher, images and real data of the second half of the classes, which the trunk has not seen."""
    first = teacher.num_classes // 2
    kept = images.labels >= first
    if not kept.any():
        raise InputError(f"no image shows one of the classes {first} to {teacher.num_classes - 1}, which the trunk has to learn: make more --images")
    images = smi.SparseImages(
        images.patches[kept], images.index[kept], images.labels[kept] - first, images.trajectory[kept], images.stage[kept], images.grid,
        images.mean, images.std,
    )  # fmt: skip
    real_images, labels = evaluation
    return _with_classes(teacher, first, teacher.num_classes), images, (real_images[labels >= first], labels[labels >= first] - first)


def _with_classes(teacher: nn.Module, start: int, stop: int) -> nn.Module:
    """The teacher, answering with some of its classes alone."""
    sliced = copy.deepcopy(teacher)
    head = nn.Linear(teacher.head.in_features, stop - start)
    with torch.no_grad():
        head.weight.copy_(teacher.head.weight[start:stop])
        head.bias.copy_(teacher.head.bias[start:stop])
    sliced.head, sliced.num_classes = head, stop - start
    return sliced.eval()


def trunk(config, folder: Path) -> nn.Module:
    """A student of the teacher's architecture whose trunk learned the first half of the classes from real images; its head is as it was drawn."""
    path = folder / "trunk"
    with FileLock(folder / "trunk.lock"):  # processes side by side want the same one
        if not (path / DESCRIPTION).exists():
            save_model(_learned_trunk(config), path)
    return load_model_folder(path)


def _learned_trunk(config) -> nn.Module:
    teacher = teacher_of(config.teacher)
    first = teacher.num_classes // 2
    images, labels = real(config, "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = build(architecture(teacher))
        student.pretrained_cfg = teacher.pretrained_cfg
        student.reset_classifier(first)
        learn(student.train(), images[labels < first], labels[labels < first], config.trunk_learning)
        student.reset_classifier(teacher.num_classes - first)
    return student.eval()
