"""The engine as a whole: its pixel gradient against float32, replays of a graph against the same updates one by one, a run with events."""

import time

import torch
import torch.nn.functional as F

import smi
from smi.engine import Fused
from smi.inversion import augmentation
from smi.inversion.graph import Runner
from smi.inversion.losses import cross_entropy
from smi.inversion.step import Step
from smi.kernels import versions
from smi.models.vit import ViT

from ..cases import suites
from ..sides.make import build_model
from ..sides.step_inputs import make_inputs
from .calls import build_vit, make_step
from .setting import Setting, settle
from .worker import Work

SIDES = ("stock", "triton", "cuda")  # "cuda" is Triton where an operation has no CUDA version
COSINE = 0.99  # of every image's gradient, at least
IMAGES, UPDATES = 8, 20
STAGE = 10  # iterations of a stage of the short run


def run(work: Work) -> None:
    setting = settle(work)
    vit = build_vit(suites.BASE, setting.device, torch.float32)
    sides = SIDES[:1] if setting.rehearsal else SIDES
    cases = {}
    for active in (vit.num_patches, setting.sizes.few):
        for side in sides:
            cases[f"gradient {side} {active} patches"] = lambda active=active, side=side: [gradient(vit, active, side)]
            cases[f"replays {side} {active} patches"] = lambda active=active, side=side: [replays(vit, active, side)]
    for side in reversed(sides):
        cases[f"PRI {side}"] = lambda side=side: [events(setting, side)]
    work.cases(cases, setting.file, setting.about)
    work.wrong += [f"{row['kind']} {row['side']}" for row in work.rows if not row["right"]]
    cosines = [row["cosine"] for row in work.rows if row["kind"] == "gradient"]
    right = f"{len(work.rows) - len(work.wrong)} of {len(work.rows)} right"
    work.found.insert(0, right + (f", least cosine {min(cosines):.4f}" if cosines else ""))


def gradient(vit: ViT, active: int, side: str) -> dict:
    """Cosine of each image's pixel gradient with that of the reference engine in float32; the least."""
    inputs = make_inputs(vit, IMAGES, active)
    fused = Fused(vit, torch.bfloat16)

    def step(engine: Fused | ViT) -> tuple[torch.Tensor, float]:
        moments = torch.zeros_like(inputs.images), torch.zeros_like(inputs.images)
        about = {"lr": inputs.lr, "betas": inputs.betas}
        made = Step(engine, inputs.images.clone(), moments, inputs.labels, inputs.index, [cross_entropy], inputs.low, inputs.high, **about)
        loss = made.run(torch.ones((), dtype=torch.int64, device=vit.device), inputs.table[0])
        return made.grad.flatten(1), float(loss)

    with versions.forced("stock"):
        wanted, wanted_loss = step(vit)
    with versions.forced(side):
        found, loss = step(fused)
    cosine, difference = float(F.cosine_similarity(found, wanted).min()), float((found - wanted).norm() / wanted.norm())
    about = {"kind": "gradient", "side": side, "active": active, "cosine": cosine, "relative_error": difference, "loss": loss}
    return about | {"loss_float32": wanted_loss, "right": cosine > COSINE}


def replays(vit: ViT, active: int, side: str) -> dict:
    """Whether UPDATES replays of the captured graph move the pixels as the same updates, launched one by one, do: bit for bit."""

    def moved(captured: bool) -> tuple[torch.Tensor, ...]:
        step, _, _ = make_step(vit, IMAGES, active, torch.bfloat16)
        table = augmentation.draw(UPDATES, vit.image_size, torch.Generator().manual_seed(0)).to(vit.device)
        curve = torch.zeros(UPDATES, device=vit.device)
        runner = Runner(step, table, curve, 0)
        if not captured:
            runner.graph = None
        for _ in range(UPDATES):
            runner()
        return step.images, *step.moments, curve

    with versions.forced(side):
        pairs = list(zip(moved(True), moved(False), strict=True))
    same = all(torch.equal(a, b) for a, b in pairs)
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    finite = all(bool(torch.isfinite(a).all()) for a, _ in pairs)
    return {"kind": "replays", "side": side, "active": active, "updates": UPDATES, "largest_difference": worst, "right": same and finite}


def events(setting: Setting, side: str) -> dict:
    """A PRI run of a few iterations a stage: every patch of a trajectory is in exactly one of its images, all pixels are finite."""
    model, division = build_model(suites.BASE, {}, setting.device), setting.sizes.division
    began = time.monotonic()
    with versions.forced(side):
        run = {"method": "pri", "division": division, "iterations": STAGE * division, "num_images": 2 * division, "batch_size": 2}
        images = smi.invert(model, engine="fused", progress=False, device=str(setting.device), **run)
    patches = images.grid[0] * images.grid[1]
    covered = all(sorted(images.index[images.trajectory == t].flatten().tolist()) == list(range(patches)) for t in (0, 1))
    seconds = time.monotonic() - began
    return {"kind": "events", "side": side, "seconds": seconds, "right": covered and bool(torch.isfinite(images.patches).all())}
