"""The kinds of files that the package reads: how a sound one is made, what reads it, and what is done with it when it is read.

Samples are made once, with everything fixed that a run would draw, and lie in one folder for each group of kinds.
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn

import smi
from smi import datasets
from smi.csrc import host
from smi.distillation import run_folder, training_state
from smi.inversion.snapshots import load_progress
from smi.kernels import tuned, verdicts
from smi.models import by_name, checkpoint
from smi.models.folder import load_model_folder, save_model
from smi.report.evidence_data import read_evidence
from smi.report.several_runs import read_demo
from smi.runs.folder import read_run

CHECKPOINT_OF = "test_vit"
IMAGE, CLASSES = 8, 3
GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class Kind:
    """A kind of file. group: what makes the folder of its sample. file: in it, a pattern. form: its format. read: given the folder. use: of what was
    read. weight: its share of the cases: what is read fast is read more often."""

    name: str
    group: str
    file: str
    form: str
    read: Callable[[Path], Any]
    use: Callable[[Any], object] = lambda value: None
    weight: float = 1.0


@cache
def model() -> nn.Module:
    """A ViT of one block whose every parameter is random."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: Any = VisionTransformer(img_size=IMAGE, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=CLASSES).eval()
    made.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
    return made


def invert(**settings: Any) -> smi.SparseImages:
    """Four sparse images of it."""
    return smi.invert(model(), method="pri", division=2, num_images=4, iterations=4, batch_size=1, progress=False, **settings)


@cache
def images() -> smi.SparseImages:
    """The same four for all that takes images."""
    return invert()


@cache
def _optimiser() -> torch.optim.Optimizer:
    student = _student()
    made = torch.optim.AdamW(student.parameters())
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    return made


@cache
def _student() -> nn.Module:
    return nn.Linear(3, 2)


@cache
def quantised() -> Any:
    """A simulation of the model in W8/A8."""
    return smi.quantize(model(), images())


# Samples: each writes its folder.


def _checkpoints(folder: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, folder / "zip.pth")
    torch.save(weights, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(weights, folder / "model.safetensors")


def _timm_checkpoint(folder: Path) -> None:
    by = by_name.load_model(CHECKPOINT_OF, random_weights=True)
    torch.save({"model": by.state_dict()}, folder / "timm.pth")


def _state(folder: Path) -> None:
    progress = {"step": 3, "seconds": 1.5, "curve": [{"step": 3, "kl": 0.5}], "best": None}
    training_state.save_state(folder / run_folder.STATE, _student(), _optimiser(), progress, {"best.weight": torch.ones(2)})


def distil(folder: Path) -> Any:
    """A distillation of one step, or what an earlier one with this folder came to."""
    return smi.distill(model(), model(), images(), steps=1, batch_size=2, output=folder, progress=False)


def _tables(folder: Path) -> None:
    row = {"method": "Dense", "folder": "dense", "sparsity": 0.0, "images": 4, "seconds": 1.0, "images_per_second": 4.0, "speedup": 1.0}
    row |= {"flops_speedup": 1.0, "agreement": 1.0, "w8a8": 0.9, "w4a8": 0.8, "transfer": 0.7}
    settings = {"iterations": 4, "batch_size": 2, "tv_weight": 1e-4, "device": "cpu"}
    demo = {"format": "smi.demo/1", "table": [row, row], "settings": settings, "notes": ["A note."], "full": 0.95, "downstream": {"steps": 1}}
    (folder / "demo.json").write_text(json.dumps(demo))
    (folder / "config.json").write_text(json.dumps({"data": "digits", "iterations": 4}))
    cell = folder / "seed0" / "dense"
    cell.mkdir(parents=True)
    curve = [{"step": 1, "seconds": 0.5, "accuracy": 0.5}]
    (cell / "cell.json").write_text(json.dumps({"seconds": 2.0, "agreement": 0.9, "small_curve": curve}))


def _pictures(folder: Path) -> None:
    from PIL import Image

    picture = Image.fromarray(torch.arange(192, dtype=torch.uint8).view(8, 8, 3).numpy())
    for form in ("png", "jpeg", "bmp", "tiff", "webp", "ppm"):
        for label in range(2):
            (folder / form / str(label)).mkdir(parents=True)
            picture.save(folder / form / str(label) / f"one.{form}")


def _parquet(folder: Path) -> None:
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    content = io.BytesIO()
    Image.fromarray(torch.arange(192, dtype=torch.uint8).view(8, 8, 3).numpy()).save(content, "PNG")
    rows = {"img": [{"bytes": content.getvalue(), "path": None}] * 3, "label": [0, 1, 2]}
    parquet.write_table(pyarrow.table(rows), folder / "test.parquet")


def _kernels(folder: Path) -> None:
    found = [verdicts.Verdict("attention", "forward", "triton", "bfloat16", "any", "correct", 1.5, "largest error 1e-3 in out, 2e-3 allowed")]
    key = {"operation": "attention", "device": "Imaginary", "torch": "2"}
    (folder / "verdicts.json").write_text(json.dumps({"identity": key, "verdicts": [verdict._asdict() for verdict in found]}))
    tiles = {"attention": {"forward any": {"tile": [64, 64, 4, 2], "ms": 0.5, "built_in": [64, 32, 4, 2]}}}
    (folder / "imaginary.json").write_text(json.dumps({"device": "Imaginary", "made": {}, "operations": tiles}))


LIBRARY = 'extern "C" int smi_answer(int x) { return 2 * x; }\n'


def _library(folder: Path) -> None:
    (folder / "answer.cpp").write_text(LIBRARY)
    _built(folder)


# Readers.


def _built(folder: Path) -> int:
    """What the library of this folder answers, compiled where it is missing, or not what it was."""
    recipe = host.Recipe(["-shared", "-fPIC", "-O0"], [folder / "answer.cpp"], b"")
    made = host.Library("the sample", "answer.so", "the sample", "nothing runs instead", lambda compiler: recipe, lambda loaded: None)
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder)}):
        failure = made.ensure_built()
    if failure or made.loaded is None:
        raise smi.RunError(failure or "the library was not loaded")
    return made.loaded.smi_answer(21)


def _answers(value: int) -> None:
    assert value == 42, f"the library answers {value}"


def _progress(folder: Path) -> Any:
    return load_progress(folder, json.loads((folder / "images.json").read_text())["provenance"]["run"])


def _verdicts(folder: Path) -> list[verdicts.Verdict]:
    known = {"operation": "attention", "device": "Imaginary", "torch": "2"}
    with mock.patch.multiple(verdicts, cache_file=lambda key: folder / "verdicts.json", identity=lambda operation, device: known):
        return verdicts.cached("attention", GPU)


def _use_verdicts(found: list[verdicts.Verdict]) -> None:
    assert all(isinstance(verdict.chosen, bool) and str(verdict.key) for verdict in found)
    sorted(found, key=lambda verdict: verdict.speedup)


class Tile(NamedTuple):
    """As launchers have them."""

    rows: int = 64
    columns: int = 32
    warps: int = 4
    stages: int = 2


def _tile(folder: Path) -> tuple:
    tuned.table.cache_clear()
    with mock.patch.object(tuned, "FOLDER", folder), mock.patch.object(torch.cuda, "get_device_name", return_value="Imaginary"):
        return tuned.tile("attention", "forward any", Tile(), GPU)


def _use_tile(found: tuple) -> None:
    assert all(type(number) is int for number in found), found


def _use_images(found: smi.SparseImages) -> None:
    assert len(found[:1]) <= 1
    repr(found)
    if found.grid[0] * found.grid[1] * found.patches[0].numel() < 1e6:
        found.to_pixels()
    try:
        smi.evaluate(found, model())
        smi.forward_sparse(model(), found)
    except (smi.InputError, smi.RunError):  # made for another model
        return


def _use_model(found: Any) -> None:
    try:
        smi.accelerate(found, dtype="float32")(torch.zeros(1, 3, IMAGE, IMAGE))
    except smi.InputError:  # another model than that of the sample
        return


def _use_quantised(found: Any) -> None:
    try:
        found(images())
    except smi.InputError:
        return


def _use_labelled(found: tuple) -> None:
    pixels, labels = found
    assert pixels.shape[1:] == (3, IMAGE, IMAGE), pixels.shape
    assert len(labels) == len(pixels)


SIZES = datasets.Sizes(3, (IMAGE, IMAGE), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), num_classes=CLASSES)

SAMPLES: dict[str, Callable[[Path], object]] = {
    "images": lambda folder: invert(output=folder),
    "model": lambda folder: save_model(model(), folder, {"made": "here"}),
    "int8": lambda folder: quantised().int8().save(folder),
    "simulated": lambda folder: quantised().save(folder),
    "distilled": lambda folder: distil(folder),
    "state": _state,
    "checkpoints": _checkpoints,
    "timm": _timm_checkpoint,
    "tables": _tables,
    "pictures": _pictures,
    "parquet": _parquet,
    "kernels": _kernels,
    "library": _library,
}


def _labelled(form: str, folder: Path) -> Any:
    return datasets.load(folder / form, SIZES)


def every() -> list[Kind]:
    """All kinds."""
    load_images, load_quantised = smi.SparseImages.load, smi.load_quantized
    return [
        Kind("images.json", "images", "images.json", "json", load_images, _use_images, 8),
        Kind("images part", "images", "images-*-00000-*.safetensors", "safetensors", load_images, _use_images, 8),
        Kind("run.json", "images", "run.json", "json", read_run, weight=4),
        Kind("progress", "images", "progress.safetensors", "safetensors", _progress, weight=10),
        Kind("model.json", "model", "model.json", "json", load_model_folder, _use_model, 2),
        Kind("model.safetensors", "model", "model.safetensors", "safetensors", load_model_folder, _use_model, 2),
        Kind("quantized.json, int8", "int8", "quantized.json", "json", load_quantised, _use_quantised, 3),
        Kind("int8.safetensors", "int8", "int8.safetensors", "safetensors", load_quantised, _use_quantised, 3),
        Kind("quantized.json, simulated", "simulated", "quantized.json", "json", load_quantised, _use_quantised),
        Kind("simulated weights", "simulated", "simulated.*", _form_of_simulated(), load_quantised, _use_quantised),
        Kind("result.json", "distilled", "result.json", "json", distil),
        Kind("student.safetensors", "distilled", "model.safetensors", "safetensors", distil),
        Kind("state.safetensors", "state", "state.safetensors", "safetensors", _resumed, weight=6),
        Kind("checkpoint .pth", "checkpoints", "zip.pth", "zip", lambda folder: checkpoint.read_weights(folder / "zip.pth"), weight=6),
        Kind(
            "checkpoint legacy .pth", "checkpoints", "legacy.pth", "pickle", lambda folder: checkpoint.read_weights(folder / "legacy.pth"), weight=6
        ),
        Kind("checkpoint .safetensors", "checkpoints", "model.safetensors", "safetensors", _read_safetensors, weight=6),
        Kind("checkpoint by name", "timm", "timm.pth", "zip", lambda folder: by_name.load_model(CHECKPOINT_OF, checkpoint=folder / "timm.pth")),
        Kind("Parquet", "parquet", "test.parquet", "parquet", lambda folder: datasets.load(folder / "test.parquet", SIZES), _use_labelled, 6),
        *(
            Kind(f"picture .{form}", "pictures", f"{form}/0/one.{form}", form, partial(_labelled, form), _use_labelled, 3)
            for form in ("png", "jpeg", "bmp", "tiff", "webp", "ppm")
        ),
        Kind("demo.json", "tables", "demo.json", "json", read_demo, weight=6),
        Kind("evidence config.json", "tables", "config.json", "json", read_evidence, weight=3),
        Kind("evidence cell.json", "tables", "seed0/dense/cell.json", "json", read_evidence, weight=3),
        Kind("verdict cache", "kernels", "verdicts.json", "json", _verdicts, _use_verdicts, 3),
        Kind("tile table", "kernels", "imaginary.json", "json", _tile, _use_tile, 3),
        Kind("compiled library", "library", "smi/csrc/*/answer.so", "elf", _built, _answers),
    ]


def _form_of_simulated() -> str:
    from smi.quantization.files import WEIGHTS

    return "safetensors" if WEIGHTS["simulated"].endswith(".safetensors") else "zip"


def _read_safetensors(folder: Path) -> Any:
    return checkpoint.read_weights(folder / "model.safetensors")


def _resumed(folder: Path) -> Any:
    return training_state.load_state(folder / run_folder.STATE, _student(), _optimiser())


def make_samples(kinds: Iterable[Kind], folder: Path) -> dict[str, Path]:
    """The sample folder of every group that the kinds need."""
    made = {}
    for group in dict.fromkeys(kind.group for kind in kinds):
        made[group] = folder / group.replace(" ", "-")
        shutil.rmtree(made[group], ignore_errors=True)
        made[group].mkdir(parents=True)
        SAMPLES[group](made[group])
    return made
