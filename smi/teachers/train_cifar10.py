"""Train a ViT on CIFAR-10 with patch dropout: `python -m smi.teachers.train_cifar10 --data PATH --preset cpu|gpu --output DIR`.

cpu: 32x32 pixels, patch 4, about half an hour on two cores. gpu: DeiT-Tiny at 224 pixels in bfloat16, about half an hour of one data-centre GPU.
PATH is whatever `smi.datasets` reads: Parquet files, torchvision's folder, or a folder of class folders.

Every batch is seen through a random part of its patches, so that sparse images are nothing strange to the trained model, and with some noise, like
the first iterations of an inversion. A run that was stopped goes on from its last state when the same command is given again.
The folder then holds the model (`smi invert --model DIR`) and the record of its training.
"""

import argparse
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..datasets import Sizes, load
from ..distillation.training_state import load_state, save_state
from ..errors import InputError, RunError
from ..images.forward import forward_sparse
from ..images.patches import to_patches
from ..models.folder import DESCRIPTION, save_model
from ..random_streams import generator

SIDE, CLASSES = 32, 10  # of CIFAR-10
STATE = "state.safetensors"
SAVE_EVERY, SHOW_EVERY = 120.0, 20.0  # seconds
PARTS = (1.0, 0.75, 0.5, 0.25)  # shares of the patches with which the test images are read


@dataclass(frozen=True)
class Recipe:
    """How a teacher is trained."""

    architecture: dict  # arguments of VisionTransformer
    epochs: int
    batch_size: int
    lr: float
    mixup: float  # probability of mixing a batch with itself
    kept: tuple[float, float]  # least and largest share of patches seen, at first
    kept_late: tuple[float, float]  # the same in the last part of the training
    late: float = 0.3  # that part
    weight_decay: float = 0.05
    warmup: float = 0.05
    noise: float = 0.2  # largest deviation of the noise, in deviations of the pixels
    shift: int = 4  # pixels of 32
    smoothing: float = 0.1  # of the labels
    smoothing_late: float = 0.0  # students learn more from a teacher whose labels are not smoothed (bench/NOTES.md)
    mimetic: bool = True
    bfloat16: bool = False


PRESETS = {
    "cpu": Recipe(
        {"img_size": 32, "patch_size": 4, "num_classes": CLASSES, "embed_dim": 128, "depth": 6, "num_heads": 4},
        epochs=14,
        batch_size=128,
        lr=2e-3,
        mixup=0.0,
        kept=(0.25, 0.5),
        kept_late=(0.25, 1.0),
    ),
    "gpu": Recipe(  # DeiT-Tiny/16
        {"img_size": 224, "patch_size": 16, "num_classes": CLASSES, "embed_dim": 192, "depth": 12, "num_heads": 3},
        epochs=200,
        batch_size=512,
        lr=1e-3,
        mixup=0.5,
        kept=(0.25, 0.75),
        kept_late=(0.25, 1.0),
        bfloat16=True,
    ),
}


@dataclass(frozen=True, eq=False)
class Data:
    """CIFAR-10 in the memory of the device, as bytes."""

    train_images: Tensor  # uint8 [M, 3, 32, 32]
    train_labels: Tensor  # int64 [M]
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]  # of the training pixels, per channel, as fractions of white
    std: tuple[float, ...]

    def normalise(self, images: Tensor, side: int) -> Tensor:
        """Bytes to normalised float32 pixels, enlarged to the model's side."""
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.mean, self.std))
        pixels = (images.float() / 255 - mean) / std
        return pixels if side == images.shape[-1] else F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)


def read(path: str, device: torch.device, limit: int | None = None) -> Data:
    """Both splits; limit: images of each, for trials."""
    sizes = Sizes(3, (SIDE, SIDE), (0.0,) * 3, (1.0,) * 3, CLASSES)
    splits = []
    for split in ("train", "test"):
        images, labels = load(path, sizes, split, limit)
        splits += [images.mul_(255).round_().byte().to(device), labels.to(device)]
    pixels = splits[0].float() / 255
    return Data(*splits, tuple(pixels.mean((0, 2, 3)).tolist()), tuple(pixels.std((0, 2, 3)).tolist()))


def make(recipe: Recipe, data: Data, seed: int) -> nn.Module:
    """The untrained model."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(**recipe.architecture, patch_drop_rate=0.5)  # the rate is set anew for every batch
    model.pretrained_cfg = {"architecture": "cifar10", "mean": data.mean, "std": data.std, "flip": True}
    if recipe.mimetic:
        mimetic(model)
    return model.to(data.train_images.device)


@torch.no_grad()
def mimetic(model: nn.Module) -> None:
    """Start where trained attention ends up (Trockman and Kolter 2023): Wq^T Wk near 0.7 I + noise, Wv^T Wp near noise - 0.4 I, sinusoidal positions.

    On small data this is worth several epochs.
    """
    d, heads = model.embed_dim, model.blocks[0].attn.num_heads
    width = d // heads

    def factors(like: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(like)
        return u[:, :rank] * s[:rank].sqrt(), v[:rank].T * s[:rank].sqrt()

    for block in model.blocks:
        q, k, v = block.attn.qkv.weight.view(3, d, d)
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            left, right = factors(0.7 * torch.randn(d, d) / math.sqrt(d) + 0.7 * torch.eye(d), width)
            q[rows], k[rows] = left.T, right.T
        left, right = factors(0.4 * torch.randn(d, d) / math.sqrt(d) - 0.4 * torch.eye(d), d)
        block.attn.proj.weight.copy_(left)
        v.copy_(right.T)
    rows, columns = model.patch_embed.grid_size
    frequency = 100.0 ** (-torch.arange(d // 4) / (d // 4))
    angles = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))[..., None] * frequency  # [2, rows, columns, d/4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    model.pos_embed[0, 1:] = 0.5 * torch.cat([waves[0], waves[1]], dim=-1).flatten(0, 1)


def smoothing(recipe: Recipe, step: int, steps: int) -> float:
    """How much the labels of a step are smoothed."""
    return recipe.smoothing_late if _is_late(recipe, step, steps) else recipe.smoothing


def batch(data: Data, recipe: Recipe, step: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised pixels [B, 3, S, S] and target probabilities [B, classes] of a step; the same whenever it is asked for."""
    per_epoch, size = len(data.train_images) // recipe.batch_size, recipe.batch_size
    order = torch.randperm(len(data.train_images), generator=generator(seed, "epoch", step // per_epoch))
    place = step % per_epoch * size
    chosen = order[place : place + size].to(data.train_images.device)
    draw = generator(seed, "batch", step)
    images = _jitter(data.train_images[chosen], recipe.shift, draw)
    pixels = data.normalise(images, recipe.architecture["img_size"])
    smooth = smoothing(recipe, step, steps)
    targets = F.one_hot(data.train_labels[chosen], CLASSES).float() * (1 - smooth) + smooth / CLASSES
    if torch.rand(1, generator=draw) < recipe.mixup:
        share = torch.rand(1, generator=draw).to(pixels.device)
        pixels, targets = torch.lerp(pixels, pixels.flip(0), share), torch.lerp(targets, targets.flip(0), share)
    level = recipe.noise * torch.rand(size, 1, 1, 1, generator=draw).to(pixels.device)
    torch.manual_seed(seed + (step + 1) * 7919)  # noise and patch dropout draw on the device
    return pixels + level * torch.randn_like(pixels), targets


def _jitter(images: Tensor, shift: int, draw: torch.Generator) -> Tensor:
    """Each image shifted by up to `shift` pixels, borders reflected, and flipped half of the time."""
    size, _, side, _ = images.shape
    dy, dx = torch.randint(0, 2 * shift + 1, (2, size, 1), generator=draw).to(images.device)
    flip = torch.randint(0, 2, (size, 1), generator=draw).bool().to(images.device)
    along = torch.arange(side, device=images.device)
    rows, columns = along + dy, torch.where(flip, along.flip(0), along) + dx  # [B, side]
    padded = F.pad(images.float(), (shift,) * 4, mode="reflect")
    return padded[torch.arange(size, device=images.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def kept_share(recipe: Recipe, step: int, steps: int, seed: int) -> float:
    """The share of patches that a step sees."""
    least, most = recipe.kept_late if _is_late(recipe, step, steps) else recipe.kept
    return least + (most - least) * torch.rand(1, generator=generator(seed, "kept", step)).item()


def _is_late(recipe: Recipe, step: int, steps: int) -> bool:
    return step >= (1 - recipe.late) * steps


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """Warm-up and cosine."""
    return recipe.lr * min((step + 1) / (recipe.warmup * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, part: float = 1.0, limit: int | None = None) -> float:
    """Share of the test images that are recognised from a random part of their patches."""
    side, patch = model.patch_embed.img_size[0], model.patch_embed.patch_size[0]
    draw, right = torch.Generator().manual_seed(0), 0
    images, labels = data.test_images[:limit], data.test_labels[:limit]
    for some, wanted in zip(images.split(500), labels.split(500), strict=True):
        patches = to_patches(data.normalise(some, side), patch)
        count = round(part * patches.shape[1])
        index = torch.rand(patches.shape[:2], generator=draw).argsort(1)[:, :count].sort(1).values.to(patches.device)
        chosen = patches[torch.arange(len(patches), device=patches.device)[:, None], index]
        right += int((forward_sparse(model, (chosen, index)).argmax(1) == wanted).sum())
    return right / len(images)


def train(recipe: Recipe, data: Data, folder: Path, seed: int = 0) -> tuple[nn.Module, dict]:
    """The trained model and its record; goes on from the state in `folder` where there is one of the same recipe."""
    steps = recipe.epochs * (len(data.train_images) // recipe.batch_size)
    if not steps:
        raise InputError(f"{len(data.train_images)} training images do not fill one batch of {recipe.batch_size}")
    model = make(recipe, data, seed)
    optimiser = torch.optim.AdamW(_groups(model, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.98))
    path, asked = folder / STATE, {"recipe": _plain(recipe), "seed": seed, "images": len(data.train_images)}
    first, seconds, curve = 0, 0.0, []
    if path.exists():
        progress, _ = load_state(path, model, optimiser)
        if progress["asked"] != asked:
            raise InputError(f"{folder} holds the state of another recipe, seed or data: choose another folder, or --force to begin anew")
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


def _plain(recipe: Recipe) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(recipe).items()}


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; vectors, prefix tokens and position embeddings do not."""
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))]
    chosen = set(map(id, matrices))
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in chosen], "weight_decay": 0.0},
    ]


def _update(model: nn.Module, optimiser: torch.optim.Optimizer, recipe: Recipe, data: Data, step: int, steps: int, seed: int) -> Tensor:
    model.train()
    model.patch_drop.prob = 1 - kept_share(recipe, step, steps, seed)
    for group in optimiser.param_groups:
        group["lr"] = rate(recipe, step, steps)
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
        "training": _plain(recipe),
        "seed": seed,
        "steps": steps,
        "seconds": seconds,
        "device": str(data.train_images.device),
        "threads": torch.get_num_threads(),
        "test_accuracy_by_share_of_patches_kept": {str(part): accuracy(model, data, part) for part in PARTS},
        "curve": curve,
        "torch": torch.__version__,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Parquet files, torchvision's folder or class folders of CIFAR-10")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--output", required=True, type=Path, help="folder for the model, its record and the state of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="instead of the preset's")
    parser.add_argument("--limit", type=int, help="images of each split, to try the command out")
    parser.add_argument("--device", help="a GPU where there is one when absent")
    parser.add_argument("--force", action="store_true", help="begin anew in a folder that holds a model or the state of a run")
    given = parser.parse_args(arguments)
    try:
        return _run(given)
    except InputError as error:
        print(f"train_cifar10: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"train_cifar10: {error}", file=sys.stderr)
        return 1


def _run(given: argparse.Namespace) -> int:
    recipe = PRESETS[given.preset]
    if given.epochs is not None:
        recipe = Recipe(**{**asdict(recipe), "epochs": given.epochs})
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if (given.output / DESCRIPTION).exists() and not given.force:
        raise InputError(f"{given.output} holds a trained model: choose another folder, or pass --force to train anew")
    if given.force:
        (given.output / STATE).unlink(missing_ok=True)
    given.output.mkdir(parents=True, exist_ok=True)
    data = read(given.data, device, given.limit)
    model, record = train(recipe, data, given.output, given.seed)
    save_model(model, given.output, record)
    (given.output / STATE).unlink(missing_ok=True)
    measured = ", ".join(
        f"{value:.1%} from {float(part):.0%} of the patches" for part, value in record["test_accuracy_by_share_of_patches_kept"].items()
    )
    print(f"test accuracy {measured}; written to {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
