"""Train the embedded teacher on scikit-learn's digits: `python -m smi.teachers.train_digits [FOLDER]`, a few minutes on two cores.

Patch dropout (Liu et al. 2023): every batch is seen through a random part of its patches, from a quarter to all, so that sparse images are in the
trained model's distribution. Shifts and noise do the same for jitter and for the first iterations of an inversion.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..images.forward import forward_sparse
from ..images.patches import to_patches
from . import ARCHITECTURE, FOLDER, RECORD, WEIGHTS, untrained_digits

SIDE, PATCH = ARCHITECTURE["img_size"], ARCHITECTURE["patch_size"]
CONFIG = {
    "epochs": 150,
    "batch_size": 64,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "warmup": 0.05,
    "least_kept": 0.25,
    "shift": 3,
    "noise": 0.5,
    "smoothing": 0.0,  # students learn more from a teacher whose labels were not smoothed (bench/NOTES.md)
    "seed": 0,
}


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test split of the digits: images [M, 1, 32, 32] as fractions of white and labels; the test quarter takes no part in training."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    train, test = train_test_split(range(len(data.target)), test_size=0.25, random_state=0, stratify=data.target)
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    return images[train], labels[train], images[test], labels[test]


def random_patches(images: Tensor, kept: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`kept` random patches of each image [B, C, H, W]: patches [B, kept, C, p, p] and index [B, kept]."""
    patches = to_patches(images, PATCH)
    index = torch.rand(patches.shape[:2], generator=generator).argsort(1)[:, :kept].sort(1).values
    return patches[torch.arange(len(images))[:, None], index], index


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, kept: float = 1.0) -> float:
    """Fraction of normalised images that are recognised from a random fraction `kept` of their patches."""
    count = round(kept * (SIDE // PATCH) ** 2)
    logits = forward_sparse(model, random_patches(images, count, torch.Generator().manual_seed(0)))
    return (logits.argmax(1) == labels).double().mean().item()


def train(config: dict) -> tuple[nn.Module, dict]:
    """The trained model and its record."""
    torch.manual_seed(config["seed"])
    generator = torch.Generator().manual_seed(config["seed"])
    train_images, train_labels, test_images, test_labels = load_digits()
    mean, std = train_images.mean().item(), train_images.std().item()
    train_images, test_images = ((images - mean) / std for images in (train_images, test_images))
    model = untrained_digits(mean, std)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"], betas=(0.9, 0.99))
    steps = config["epochs"] * (len(train_images) // config["batch_size"])
    warmup = config["warmup"] * steps
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: min((t + 1) / warmup, 0.5 * (1 + math.cos(math.pi * t / steps))))
    patches = (SIDE // PATCH) ** 2
    for step in range(steps):
        chosen = torch.randint(len(train_images), (config["batch_size"],), generator=generator)
        dy, dx = torch.randint(-config["shift"], config["shift"] + 1, (2,), generator=generator).tolist()
        noise = torch.rand(len(chosen), 1, 1, 1, generator=generator) * config["noise"]
        images = train_images[chosen].roll((dy, dx), (2, 3))
        images = images + noise * torch.randn(images.shape, generator=generator)
        kept = round(patches * (config["least_kept"] + (1 - config["least_kept"]) * torch.rand(1, generator=generator).item()))
        loss = F.cross_entropy(
            forward_sparse(model, random_patches(images, kept, generator)), train_labels[chosen], label_smoothing=config["smoothing"]
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        if (step + 1) % (steps // 20) == 0:
            print(f"step {step + 1}/{steps}  loss {loss:.3f}  test accuracy {accuracy(model, test_images, test_labels):.4f}", flush=True)
    record = {
        "data": "scikit-learn digits, 8x8 enlarged to 32x32, a stratified quarter held out",
        "train_images": len(train_images),
        "test_images": len(test_images),
        "mean": mean,
        "std": std,
        "architecture": ARCHITECTURE,
        "training": config,
        "test_accuracy": accuracy(model, test_images, test_labels),
        "test_accuracy_by_share_of_patches_kept": {str(kept): accuracy(model, test_images, test_labels, kept) for kept in (0.75, 0.5, 0.25)},
        "torch": torch.__version__,
    }
    return model, record


def main(folder: Path = FOLDER) -> None:
    """Train, and write weights and record to a folder."""
    model, record = train(CONFIG)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / WEIGHTS.name)
    (folder / RECORD.name).write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['test_accuracy']:.4f} of {record['test_images']} test digits recognised; written to {folder}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
