"""Train a ViT on CIFAR-10 with patch dropout: `python -m smi.teachers.train_cifar10 --data PATH --preset cpu|gpu --output DIR`.

cpu: 32x32 pixels, patch 4, about half an hour on two cores. gpu: DeiT-Tiny at 224 pixels in bfloat16, about half an hour of one data-centre GPU.
PATH is whatever `smi.datasets` reads: Parquet files, torchvision's folder, or a folder of class folders.

Every batch is seen through a random part of its patches, so that sparse images are in the trained model's distribution, and with noise, like the
first iterations of an inversion. A run that was stopped goes on from its last state when the same command is given again. At the end DIR holds the
model (`smi invert --model DIR`) and the record of its training.
"""

import argparse
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distillation.training_state import load_state, save_state
from ..errors import InputError, RunError
from ..images.forward import forward_sparse
from ..images.patches import to_patches
from ..models.folder import DESCRIPTION, save_model
from .cifar10_batches import Data, batch, read_cifar10
from .cifar10_recipe import PRESETS, Recipe, kept_share, learning_rate
from .mimetic import initialise_mimetic

STATE = "state.safetensors"
SAVE_EVERY, SHOW_EVERY = 120.0, 20.0  # seconds
KEPT = (1.0, 0.75, 0.5, 0.25)  # fractions of the patches from which the test images are recognised


def untrained_model(recipe: Recipe, data: Data, seed: int) -> nn.Module:
    """The recipe's architecture, initialised, on the data's device."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model: Any = VisionTransformer(**recipe.architecture, patch_drop_rate=0.5)  # the rate is set for every batch
    model.pretrained_cfg = {"architecture": "cifar10", "mean": data.mean, "std": data.std, "flip": True}
    if recipe.mimetic:
        initialise_mimetic(model)
    return model.to(data.train_images.device)


@torch.no_grad()
def accuracy(model: Any, data: Data, kept: float = 1.0, limit: int | None = None) -> float:
    """Fraction of the test images that are recognised from a random fraction `kept` of their patches."""
    side, patch = model.patch_embed.img_size[0], model.patch_embed.patch_size[0]
    draw, right = torch.Generator().manual_seed(0), 0
    images, labels = data.test_images[:limit], data.test_labels[:limit]
    for some, wanted in zip(images.split(500), labels.split(500), strict=True):
        patches = to_patches(data.normalise(some, side), patch)
        count = round(kept * patches.shape[1])
        index = torch.rand(patches.shape[:2], generator=draw).argsort(1)[:, :count].sort(1).values.to(patches.device)
        chosen = patches[torch.arange(len(patches), device=patches.device)[:, None], index]
        right += int((forward_sparse(model, (chosen, index)).argmax(1) == wanted).sum())
    return right / len(images)


def train(recipe: Recipe, data: Data, folder: Path, seed: int = 0) -> tuple[nn.Module, dict]:
    """The trained model and its record; goes on from the state in `folder` where there is one of the same recipe."""
    steps = recipe.epochs * (len(data.train_images) // recipe.batch_size)
    if not steps:
        raise InputError(f"{len(data.train_images)} training images do not fill one batch of {recipe.batch_size}")
    model = untrained_model(recipe, data, seed)
    optimiser = torch.optim.AdamW(_parameter_groups(model, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.98))
    path, asked = folder / STATE, {"recipe": _as_json(recipe), "seed": seed, "images": len(data.train_images)}
    first, seconds, curve = 0, 0.0, []
    if path.exists():
        progress, _ = load_state(path, model, optimiser)
        if progress["asked"] != asked:
            raise InputError(f"{folder} holds the state of another recipe, seed or data: choose another folder, or pass --force to start over")
        first, seconds, curve = progress["step"], progress["seconds"], progress["curve"]
        print(f"going on from step {first} of {steps}", flush=True)
    began = saved = shown = time.monotonic()
    for step in range(first, steps):
        loss = _update(model, optimiser, recipe, data, step, steps, seed)
        now, last = time.monotonic(), step == steps - 1
        if now - shown >= SHOW_EVERY or last:
            shown = now
            if not math.isfinite(float(loss)):
                raise RunError(f"the loss is {float(loss)} at step {step}: lower the learning rate")
            left = (now - began) / (step + 1 - first) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  epoch {(step + 1) * recipe.epochs / steps:.1f}  loss {loss:.3f}  {left / 60:.0f} min left", flush=True)
        if now - saved >= SAVE_EVERY or last:
            saved = now
            curve.append({"step": step + 1, "seconds": seconds + now - began, "test_accuracy": _while_evaluating(model, data, limit=1000)})
            print(f"step {step + 1}/{steps}  accuracy on 1000 test images {curve[-1]['test_accuracy']:.3f}", flush=True)
            save_state(path, model, optimiser, {"asked": asked, "step": step + 1, "seconds": seconds + time.monotonic() - began, "curve": curve})
    return model.eval(), _record(model, recipe, data, seed, steps, seconds + time.monotonic() - began, curve)


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(recipe).items()}


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; vectors, prefix tokens and position embeddings do not."""
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))]
    chosen = set(map(id, matrices))
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in chosen], "weight_decay": 0.0},
    ]


def _update(model: Any, optimiser: torch.optim.Optimizer, recipe: Recipe, data: Data, step: int, steps: int, seed: int) -> Tensor:
    model.train()
    model.patch_drop.prob = 1 - kept_share(recipe, step, steps, seed)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(recipe, step, steps)
    pixels, targets = batch(data, recipe, step, steps, seed)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=recipe.bfloat16 and pixels.is_cuda):
        loss = F.cross_entropy(model(pixels), targets)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.detach()


def _while_evaluating(model: nn.Module, data: Data, limit: int | None = None) -> float:
    model.eval()
    return accuracy(model, data, limit=limit)


def _record(model: nn.Module, recipe: Recipe, data: Data, seed: int, steps: int, seconds: float, curve: list[dict]) -> dict:
    return {
        "data": "CIFAR-10",
        "train_images": len(data.train_images),
        "test_images": len(data.test_images),
        "mean": data.mean,
        "std": data.std,
        "training": _as_json(recipe),
        "seed": seed,
        "steps": steps,
        "seconds": seconds,
        "device": str(data.train_images.device),
        "threads": torch.get_num_threads(),
        "test_accuracy_by_share_of_patches_kept": {str(kept): accuracy(model, data, kept) for kept in KEPT},
        "curve": curve,
        "torch": torch.__version__,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code, 2 for what was asked and 1 for what failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Parquet files, torchvision's folder or class folders of CIFAR-10")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--output", required=True, type=Path, help="folder for the model, its record and the state of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument("--limit", type=int, help="images of each split, to try the command out")
    parser.add_argument("--device", help="a GPU where there is one when absent")
    parser.add_argument("--force", action="store_true", help="start over in a folder that holds a model or the state of a run")
    given = parser.parse_args(arguments)
    try:
        _run(given)
        return 0
    except (InputError, RunError) as error:
        print(f"train_cifar10: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def _run(given: argparse.Namespace) -> None:
    recipe = PRESETS[given.preset]
    if given.epochs is not None:
        recipe = replace(recipe, epochs=given.epochs)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if (given.output / DESCRIPTION).exists() and not given.force:
        raise InputError(f"{given.output} holds a trained model: choose another folder, or pass --force to train again")
    if given.force:
        (given.output / STATE).unlink(missing_ok=True)
    given.output.mkdir(parents=True, exist_ok=True)
    data = read_cifar10(given.data, device, given.limit)
    model, record = train(recipe, data, given.output, given.seed)
    save_model(model, given.output, record)
    (given.output / STATE).unlink(missing_ok=True)
    measured = ", ".join(
        f"{value:.1%} from {float(kept):.0%} of the patches" for kept, value in record["test_accuracy_by_share_of_patches_kept"].items()
    )
    print(f"test accuracy {measured}; written to {given.output}")


if __name__ == "__main__":
    sys.exit(main())
