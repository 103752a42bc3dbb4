"""Targets of random settings: each is refused in one sentence before anything is computed, or the run succeeds and its folder loads back."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import smi
from smi import datasets
from smi.errors import InputError, RunError
from smi.images.export import export_png, export_webdataset
from smi.images.storage import MANIFEST
from smi.models.by_name import load_model
from smi.models.vit import describe

from .draw import Draw
from .kinds import CLASSES, IMAGE, images, model
from .target import Target, Wrong, refused
from .values import CONTAINERS, EVERY, NUMBERS, OBJECTS, SCALARS, TEXTS, value

ITERATIONS = 12  # that a run may take before it is stopped: it was accepted
SECONDS = 30.0


class Stopped(Exception):
    """A run that was accepted and would go on for long."""


@dataclass(frozen=True)
class Door:
    """Something that takes settings. call: given settings by name, and a folder of its own. own: values that make sense for a setting, as
    expressions. late: settings that can be refused only when something has been computed. base: what is given where a case says nothing."""

    name: str
    call: Callable[[dict[str, Any], Path], object]
    own: dict[str, tuple[str, ...]]
    late: frozenset[str] = frozenset()
    weight: float = 1.0
    base: dict[str, str] = field(default_factory=dict)


def targets(work: Path, only: str) -> list[Target]:
    """One target for each door and kind of value."""
    model(), images()
    pools = {"own": (), "numbers": NUMBERS, "scalars": SCALARS, "texts": TEXTS, "containers": CONTAINERS, "objects": OBJECTS, "every": EVERY}
    return [
        Target("settings", door.name, part, partial(_case, door, pool), Check(door), door.weight, SECONDS)
        for door in DOORS
        for part, pool in pools.items()
        if only in door.name
    ]


def _case(door: Door, pool: tuple[str, ...], draw: Draw) -> dict[str, Any]:
    chosen = draw.some(list(door.own), 1, 3)
    return {"settings": {name: draw.choice(pool if pool and not draw.chance(6) else (*door.own[name], *EVERY)) for name in chosen}}


class Check:
    """Calls a door with the settings of a case."""

    def __init__(self, door: Door) -> None:
        self.door = door

    def __call__(self, case: dict, folder: Path) -> str:
        asked = {**self.door.base, **case["settings"]}
        computed: list[int] = []
        settings = {name: value(expression, model=model(), images=images()) for name, expression in asked.items()}
        own = folder / "settings"
        own.mkdir(exist_ok=True)
        try:
            self.door.call(settings | ({"on_iteration": partial(_count, computed)} if self.door.name.startswith("invert") else {}), own)
            return "accepted"
        except Stopped:
            return "accepted"
        except InputError as error:
            if computed and not self.door.late & asked.keys():
                raise Wrong("refused when something had been computed", str(error)[:300]) from error
            return refused(error)
        except RunError as error:
            return refused(error)
        finally:
            shutil.rmtree(own, ignore_errors=True)


def _count(computed: list[int], at: Any) -> None:
    computed.append(at.iteration)
    if len(computed) > ITERATIONS:
        raise Stopped


def _invert(settings: dict[str, Any], folder: Path) -> None:
    output = folder / "images"
    made = smi.invert(model(), **{"output": output, "progress": False} | settings)
    if settings.get("output", output) is not output:
        return
    json.loads((output / MANIFEST).read_text(), parse_constant=_no_constant)
    loaded = smi.SparseImages.load(output)
    if not torch.equal(loaded.patches, made.patches):
        raise Wrong("the folder gives other images back")


def _no_constant(text: str) -> None:
    raise Wrong("the folder's JSON holds what is no JSON", text)


def _batches(settings: dict[str, Any], folder: Path) -> None:
    smi.SparseImages.cat(list(smi.invert_batches(model(), **settings)))


def _schedule(settings: dict[str, Any], folder: Path) -> None:
    made = smi.Schedule(**settings)
    if made.iterations <= ITERATIONS and made.num_patches == 4:
        smi.invert(model(), schedule=made, num_images=1, progress=False)


def _event(settings: dict[str, Any], folder: Path) -> None:
    smi.invert(model(), schedule=smi.Schedule(4, 4, (smi.Event(**settings),)), num_images=1, output=folder / "images", progress=False)
    smi.SparseImages.load(folder / "images")


def _quantize(settings: dict[str, Any], folder: Path) -> None:
    made = smi.quantize(model(), images(), **settings)
    made.save(folder / "quantised")
    smi.load_quantized(folder / "quantised")


def _distill(settings: dict[str, Any], folder: Path) -> None:
    steps = []

    def count(step: int, loss: float) -> None:
        steps.append(step)
        if len(steps) > ITERATIONS:
            raise Stopped

    smi.distill(model(), model(), images(), **{"steps": 1, "progress": False, "output": folder / "run"} | settings, on_step=count)
    if "output" not in settings:
        smi.distill(model(), model(), images(), **{"steps": 1, "progress": False, "output": folder / "run"} | settings)


def _evaluate(settings: dict[str, Any], folder: Path) -> None:
    json.dumps(smi.evaluate(images(), model(), **settings).record())


def _export(settings: dict[str, Any], folder: Path) -> None:
    if "shard_images" in settings:
        export_webdataset(images(), folder / "shards", shard_images=settings.pop("shard_images"))
    export_png(images(), folder / "png", **settings)


def _dense(settings: dict[str, Any], folder: Path) -> None:
    found = images().to_dense(**settings)
    if found.shape != (4, 3, IMAGE, IMAGE):
        raise Wrong("to_dense of another shape", str(list(found.shape)))


def _accelerate(settings: dict[str, Any], folder: Path) -> None:
    smi.accelerate(model(), **settings)(torch.zeros(1, 3, IMAGE, IMAGE))


def _describe(settings: dict[str, Any], folder: Path) -> None:
    low, high = describe(model(), **settings).valid_range()
    if not (low <= high).all():
        raise Wrong("the valid range is empty", f"{low.tolist()} to {high.tolist()}")


def _load_model(settings: dict[str, Any], folder: Path) -> None:
    load_model(**{"name": "test_vit", "random_weights": True} | settings)


def _datasets(settings: dict[str, Any], folder: Path) -> None:
    sizes = datasets.Sizes(1, (IMAGE, IMAGE), (0.5,), (0.2,), 10)
    datasets.load(**{"source": "digits", "model": sizes, "limit": 2} | settings)


def _forward(settings: dict[str, Any], folder: Path) -> None:
    if smi.forward_sparse(model(), images(), **settings).shape != (4, CLASSES):
        raise Wrong("forward_sparse of another shape")


def _load(settings: dict[str, Any], folder: Path) -> None:
    smi.load_quantized(settings["folder"]) if settings["quantised"] is True else smi.SparseImages.load(settings["folder"])


COUNTS = ("1", "2", "4", "np.int32(3)", "torch.tensor(2)", "np.array(2)")
FRACTIONS = ("0.5", "0.25", "np.float32(0.3)", "torch.tensor(0.5)")
INVERSION = {
    "method": ("'dense'", "'smi'", "'pri'", "'psaq'", "'gaussian'"),
    "num_images": COUNTS,
    "labels": ("[0, 1]", "[2]", "torch.tensor([1])", "np.array([0, 1])", "(0,)", "range(3)", "[3]", "[-1]", "[0.5]", "[True]",
               "np.array([255], dtype=np.uint8)"),
    "iterations": ("4", "5", "np.int64(6)"),
    "batch_size": COUNTS,
    "schedule": ("smi.Schedule(4, 4)", "smi.Schedule(9, 4)", "smi.Schedule(4, 4, (smi.Event(2, 1, 'lowest', 'drop'),))"),
    "prune_at": ("[1, 2]", "(2,)", "np.array([1, 3])", "torch.tensor([1, 2])", "range(1, 3)", "[3, 2]", "[100]", "[np.int64(1)]", "[1.5]", "[True]"),
    "prune_ratio": FRACTIONS,
    "division": ("2", "1", "4", "np.int64(2)", "5"),
    "importance": ("'random'", "'cls_attention'", "lambda s: s.attention", "lambda s: -s.attention * math.inf", "lambda s: s.index"),
    "losses": ("'psaq'", "'default'", "smi.default_losses()", "[lambda i, l, y: l.sum()]", "[lambda i, l, y: l.sum().item()]",
               "[lambda i, l, y: l.detach().sum()]"),
    "tv_weight": FRACTIONS,
    "lr": FRACTIONS,
    "betas": ("(0.5, 0.9)", "[0, 0]", "np.array([0.5, 0.9])", "torch.tensor([0.5, 0.9])", "(np.float32(0.5), 0.9)"),
    "init": ("torch.zeros(1, 3, 8, 8)", "torch.full((1, 3, 8, 8), math.nan)", "np.zeros((1, 3, 8, 8))",
             "torch.zeros(2, 3, 8, 8, dtype=torch.int64)", "torch.zeros(2, 3, 8, 8, dtype=torch.float64)",
             "torch.zeros(1, 3, 8, 8, requires_grad=True)", "torch.zeros(2, 3, 8, 8).to_sparse()"),
    "augmentation": ("[(1, -1, True)] * 4", "np.zeros((4, 3), dtype=int)", "torch.zeros(4, 3, dtype=torch.int64)", "[(10**9, 0, 0)] * 4",
                     "[(0.5, 0, 0)] * 4",
                     "[(0, 0, 7)] * 4", "iter([(0, 0, False)] * 4)"),
    "jitter": ("0", "1", "np.int64(2)", "100", "10**9"),
    "flip": ("True", "False", "np.bool_(False)", "torch.tensor(True)"),
    "mean": ("(0.5, 0.5, 0.5)", "np.array([0.5, 0.4, 0.3])", "torch.tensor([0.5, 0.4, 0.3])", "(0.5,)", "(2.0, 2.0, 2.0)", "('0.5',) * 3"),
    "std": ("(0.5, 0.5, 0.5)", "np.array([0.5, 0.4, 0.3])", "(0.0, 1, 1)", "(-1, 1, 1)", "(1e-300,) * 3", "(math.inf,) * 3"),
    "seed": ("0", "1", "np.int64(3)", "2**63", "2**64", "10**9"),
    "engine": ("'fused'", "'reference'", "np.str_('fused')"),
    "dtype": ("'float32'", "'float64'", "'bfloat16'", "'float16'", "torch.float32", "'auto'", "'int8'"),
    "update": ("'active'", "'all'"),
    "max_memory": ("1", "0.5", "np.float64(1.0)", "1e-9"),
    "recompute": ("True", "False", "np.bool_(True)"),
    "device": ("'cpu'", "torch.device('cpu')", "'cuda'", "'cpu:0'", "0"),
}  # fmt: skip
WRITTEN = {"snapshots": ("0", "3", "np.int64(2)"), "progress": ("False", "np.bool_(False)"), "output": ("None",), "force": ("True", "False")}
LATE = frozenset({"importance", "losses"})
BASE = {"method": "'smi'", "num_images": "2", "iterations": "4", "batch_size": "1"}
DISTILLATION = {
    "steps": COUNTS, "batch_size": COUNTS, "lr": FRACTIONS, "momentum": FRACTIONS, "weight_decay": FRACTIONS,
    "warmup": FRACTIONS,
    "clip": FRACTIONS, "temperature": ("1.0", "20", "np.float32(4)"), "head_only": ("True", "np.bool_(False)"),
    "roll": ("0", "1", "np.int64(1)"), "flip": ("True", "None"),
    "patch_dropout": FRACTIONS, "holdout": FRACTIONS, "eval_every": COUNTS, "patience": COUNTS, "refresh_every": COUNTS, "seed": ("1", "np.int64(2)"),
    "optimiser": ("'sgd'", "'adamw'"), "cosine": ("True",), "preset": ("'published'", "'adamw'"), "device": ("'cpu'", "'cuda'"),
    "evaluation": ("(torch.zeros(1, 3, 8, 8), torch.tensor([0]))", "(torch.zeros(1, 3, 8, 8), [0])",
                   "(torch.zeros(1, 3, 9, 9), torch.tensor([0]))"),
}  # fmt: skip
QUANTISATION = {
    "weight_bits": ("8", "4", "np.int64(8)"), "activation_bits": ("8", "torch.tensor(8)"), "ranges": ("'mse'", "'percentile'"),
    "percentile": ("99.0", "100"),
    "weight_ranges": ("'mse'",), "attention": ("True", "np.bool_(False)"), "batch_size": COUNTS,
}  # fmt: skip
DOORS = [
    Door("invert", _invert, INVERSION | WRITTEN, LATE, 8, BASE),
    Door("invert_batches", _batches, INVERSION, LATE, 2, BASE),
    Door("Schedule", _schedule, {"num_patches": ("4",), "iterations": ("4",), "events": ("()",)}, base={"num_patches": "4", "iterations": "4"}),
    Door("Event", _event, {"iteration": ("1", "2", "4"), "count": ("1", "3"), "which": ("'lowest'", "'highest'"), "fate": ("'drop'", "'emit'")},
         base={"iteration": "2", "count": "1", "which": "'lowest'", "fate": "'drop'"}),
    Door("quantize", _quantize, QUANTISATION, weight=0.3),
    Door("distill", _distill, DISTILLATION, frozenset({"evaluation"}), 2),
    Door("evaluate", _evaluate, {"seed": ("0", "3"), "device": ("'cpu'",), "real": ("(torch.zeros(1, 3, 8, 8), torch.tensor([0]))",),
                                 "verifier": ("model",)}),
    Door("export", _export, {"fill": ("0.5",), "shard_images": ("1", "2"), "force": ("True",)}),
    Door("to_dense", _dense, {"fill": ("0.5", "[0.1, 0.2, 0.3]", "np.float32(1)")}),
    Door("accelerate", _accelerate, {"dtype": ("'float32'", "torch.bfloat16", "'auto'")}),
    Door("describe", _describe, {"mean": INVERSION["mean"], "std": INVERSION["std"], "flip": ("True",)}),
    Door("load_model", _load_model, {"name": ("'digits'", "'test_vit.x'", "'nothing'"), "image_size": ("(32, 32)", "(33, 32)", "32"),
                                     "device": ("'cpu'",),
                                     "random_weights": ("True",), "checkpoint": ("'nowhere.pth'",)}, weight=0.5),
    Door("datasets.load", _datasets, {"limit": COUNTS, "split": ("'train'", "'test'"), "source": ("'digits'", "'nowhere'")}, weight=0.5),
    Door("forward_sparse", _forward, {"batch_size": COUNTS}),
    Door("load", _load, {"folder": ("'nowhere'", "Path('nowhere')"), "quantised": ("True", "False")},
         base={"folder": "'nowhere'", "quantised": "False"}),
]  # fmt: skip
