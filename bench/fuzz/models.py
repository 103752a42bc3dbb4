"""Targets of random models: every entry point against the model's own autograd."""

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smi
from smi.images.patches import to_patches
from smi.inversion import augmentation
from smi.inversion.losses import TV_WEIGHT
from smi.inversion.schedules import Event, Schedule, make_schedule

from ..sides import eager
from ..sides.step_inputs import StepInputs
from .draw import Draw
from .target import Target, Wrong, sentence_or
from .vits import build, in_dtype, inner, own_sparse, spec

DTYPES = ("float32", "bfloat16", "float16")
SLACK = 10.0  # times the error of stock PyTorch in the same precision: sums in another order
FLOOR = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}  # of a norm: where PyTorch happens to be exact
RESULT = 2.0**-23  # results are float32
SECONDS = 60.0


def targets(work: Path, only: str) -> list[Target]:
    """One target for each entry point and dtype, or method and engine."""
    made = []
    for name, check in {"accelerate": _accelerate, "drop_in": _drop_in}.items():
        made += [Target("models", name, dtype, partial(_entry_case, dtype), check, 1.0, SECONDS) for dtype in DTYPES]
    made.append(Target("models", "forward_sparse", "float32", partial(_entry_case, "float32"), _forward_sparse, 2.0, SECONDS))
    for method in ("dense", "smi", "pri", "own", "psaq", "gaussian"):
        for engine, dtype in (("fused", "float32"), ("fused", "bfloat16"), ("reference", "float64")):
            if (method, engine) != ("psaq", "fused"):
                case = partial(_run_case, method, engine, dtype)
                made.append(Target("models", f"invert {method}", f"{engine} {dtype}", case, _invert, 0.5, SECONDS))
    return [target for target in made if only in target.name]


def _entry_case(dtype: str, draw: Draw) -> dict[str, Any]:
    return {"model": spec(draw), "dtype": dtype, "batches": [draw.integer(1, 4) for _ in range(draw.integer(1, 3))], "active": draw.below(1000)}


def _run_case(method: str, engine: str, dtype: str, draw: Draw) -> dict[str, Any]:
    iterations = {"gaussian": 0, "smi": draw.integer(4, 5)}.get(method, draw.integer(1, 3))
    run = {"method": method, "engine": engine, "dtype": dtype, "iterations": iterations, "division": draw.integer(1, 3), "recompute": draw.chance(4)}
    return {"model": spec(draw, strange=False), "run": run, "images": draw.integer(1, 5), "batch": draw.integer(1, 3), "seed": draw.below(1000)}


def compare(what: str, found: Tensor, truth: Tensor, stock: Tensor, floor: float) -> None:
    """Raise Wrong where the error of `found` is more than SLACK times that of stock PyTorch in the same dtype, and `floor`."""
    if found.shape != truth.shape:
        raise Wrong(f"{what} of another shape", f"{list(found.shape)} should be {list(truth.shape)}")
    if not torch.isfinite(stock).all():
        return  # out of the dtype's range
    size = truth.norm().clamp_min(1e-30)
    error, theirs = ((x.double() - truth).norm() / size for x in (found.detach(), stock.detach()))
    allowed = floor + SLACK * (1 + 8 / truth.numel()) * theirs  # of a few numbers stock PyTorch's error may be small by chance
    if not error <= allowed:
        raise Wrong(f"{what} is wrong", f"error {float(error):.2e}, {float(allowed):.2e} allowed")


def gradients(function: Callable[[Tensor], Tensor], pixels: Tensor, pull: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their product with `pull` in the pixels."""
    pixels = pixels.to(dtype).requires_grad_()
    logits = function(pixels)
    (grad,) = torch.autograd.grad((logits * pull.to(logits.dtype)).sum(), pixels)
    return logits.detach(), grad


def _against(case: dict, own: Callable[[Any, Tensor], Tensor], made: Callable[[Tensor], Tensor], model: nn.Module, pixels: Tensor) -> None:
    """Hold logits and pixel gradients of one batch against those of the model's own modules in float64."""
    generator = torch.Generator().manual_seed(len(pixels))
    with torch.no_grad():
        pull = torch.randn(own(in_dtype(model, torch.float64), pixels.double()).shape, generator=generator)
    truth = gradients(partial(own, in_dtype(model, torch.float64)), pixels, pull, torch.float64)
    working = getattr(torch, case["dtype"])
    stock = gradients(partial(own, in_dtype(model, working)), pixels, pull, working)
    found = gradients(made, pixels, pull, torch.float32)
    floor = max(FLOOR[case["dtype"]], FLOOR[case["model"].get("dtype", "float64")], RESULT)  # sums of weights are rounded as the weights are
    for what, *tensors in zip(("logits", "pixel gradient"), found, truth, stock, strict=True):
        compare(what, *tensors, floor)


def _pixels(case: dict, model: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W], and an index [B, n] of some of their patches."""
    generator = torch.Generator().manual_seed(case["active"] + batch)
    options = case["model"]["options"]
    pixels = torch.randn(batch, options["in_chans"], *options["img_size"], generator=generator)
    total = (options["img_size"][0] // options["patch_size"]) * (options["img_size"][1] // options["patch_size"])
    count = 1 + case["active"] % total
    return pixels, torch.rand(batch, total, generator=generator).argsort(1)[:, :count].sort(1).values


def _entry(case: dict, check: Callable[[Any], None]) -> str:
    model = build(case["model"])
    if model is None:
        return "no such model"

    def run() -> str:
        check(model)
        return "computed"

    return sentence_or(run)


def _accelerate(case: dict, folder: Path) -> str:
    def check(model: Any) -> None:
        fast = smi.accelerate(model, dtype=case["dtype"])
        for batch in case["batches"]:
            pixels, _ = _pixels(case, model, batch)
            _against(case, lambda model, x: model(x), fast, model, pixels)

    return _entry(case, check)


def _drop_in(case: dict, folder: Path) -> str:
    def check(model: Any) -> None:
        fast = smi.drop_in(model, dtype=case["dtype"])
        for batch in case["batches"]:
            pixels, index = _pixels(case, model, batch)
            absolute = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), index + 1], 1)
            _against(case, lambda model, x, index=index: own_sparse(inner(model), x, index), lambda x, a=absolute: fast(x, a)[0], model, pixels)

    return _entry(case, check)


def _forward_sparse(case: dict, folder: Path) -> str:
    def check(model: Any) -> None:
        patch = case["model"]["options"]["patch_size"]
        weights = next(model.parameters()).dtype
        for batch in case["batches"]:
            pixels, index = _pixels(case, model, batch)

            def sparse(x: Tensor, index: Tensor = index) -> Tensor:
                patches = to_patches(x, patch)[torch.arange(len(x))[:, None], index]
                return smi.forward_sparse(model, (patches.to(weights), index))

            _against(
                case | {"dtype": str(weights).removeprefix("torch.")},
                lambda model, x, index=index: own_sparse(inner(model), x, index),
                sparse,
                model,
                pixels,
            )

    return _entry(case, check)


def _invert(case: dict, folder: Path) -> str:
    model = build(case["model"])
    if model is None:
        return "no such model"
    try:
        return sentence_or(lambda: _inverted(model, case, folder / "images"))
    finally:
        shutil.rmtree(folder / "images", ignore_errors=True)


def _inverted(model: Any, case: dict, output: Path) -> str:
    run, (height, width), patch = case["run"], case["model"]["options"]["img_size"], case["model"]["options"]["patch_size"]
    cells = (height // patch) * (width // patch)
    model = model.double() if run["dtype"] == "float64" else model  # the description adds prefix and position in the model's own dtype
    schedule = _schedule(run, cells)
    trajectories = -(-case["images"] // schedule.images_per_trajectory)
    generator = torch.Generator().manual_seed(case["seed"])
    pixels = torch.randn(trajectories, model.in_chans, height, width, generator=generator)
    labels = torch.randint(model.num_classes, (trajectories,), generator=generator)
    table = augmentation.draw(schedule.iterations, (height, width), generator)
    losses: list[float] = []
    which = {"schedule": schedule} if run["method"] == "own" else {"method": run["method"]}
    which |= {"division": run["division"]} if run["method"] == "pri" else {}
    settings: dict[str, Any] = {"recompute": run["recompute"]} if run["engine"] == "fused" else {}
    images = smi.invert(
        model, **which, **settings, num_images=case["images"], iterations=schedule.iterations, batch_size=trajectories, labels=labels, init=pixels,
        augmentation=table.tolist(), engine=run["engine"], dtype=run["dtype"], update="all", output=output, progress=False,
        on_iteration=lambda at: losses.append(at.loss),
    )  # fmt: skip
    _same(smi.SparseImages.load(output), images)
    if len(images) != case["images"] or not torch.isfinite(images.patches).all():
        raise Wrong("the images are not as many, or not finite")
    if run["method"] == "gaussian":
        if not torch.equal(images.to_dense(), pixels.to(images.patches.dtype)):
            raise Wrong("gaussian images are not what they start from")
    elif run["method"] != "psaq":
        _like_eager(model, run, schedule, pixels, labels, table, images, losses)
    return "computed"


def _schedule(run: dict, cells: int) -> Schedule:
    iterations = run["iterations"]
    if run["method"] != "own":
        return make_schedule(run["method"], cells, iterations, **({"division": run["division"]} if run["method"] == "pri" else {}))
    events = [Event(1, cells // 3, "highest", "emit"), Event(iterations, cells - 2 * (cells // 3), "lowest", "drop")] if iterations > 1 else []
    return Schedule(cells, iterations, tuple(events))


def _same(loaded: smi.SparseImages, images: smi.SparseImages) -> None:
    for name in ("patches", "index", "labels", "trajectory", "stage"):
        if not torch.equal(getattr(loaded, name), getattr(images, name)):
            raise Wrong(f"the folder gives other {name} back")


def _like_eager(
    model: Any, run: dict, schedule: Schedule, pixels: Tensor, labels: Tensor, table: Tensor, images: smi.SparseImages, losses: list
) -> None:
    """The first loss; and in float64 every pixel and patch, as eager code computes them."""
    mean, std = (torch.tensor(images_statistics, dtype=torch.float64) for images_statistics in (images.mean, images.std))
    index = torch.arange(schedule.num_patches).expand(len(pixels), -1)
    inputs = StepInputs(pixels.double(), labels, index, table, -mean / std, (1 - mean) / std, TV_WEIGHT)
    first = table.clone()
    first[sorted(schedule.still_iterations())] = 0
    wanted = float(eager.EagerStep(model, inputs).loss(*first[0].tolist()).detach())
    tolerance = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1}[run["dtype"]]
    if not math.isclose(losses[0], wanted, rel_tol=tolerance, abs_tol=tolerance):
        raise Wrong("the first loss is wrong", f"{losses[0]}, should be {wanted}")
    if run["dtype"] != "float64":
        return
    parts = eager.invert(model, schedule, inputs, table)
    index, patches = (torch.stack([part[i] for part in parts], 1).flatten(0, 1)[: len(images)] for i in (1, 0))
    if not torch.equal(images.index, index) or (images.patches - patches).abs().max() > 1e-5:
        raise Wrong("the images are not those of eager code")
