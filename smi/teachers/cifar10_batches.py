"""CIFAR-10 in memory, and the batches that a teacher is trained with."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets import Sizes, load
from ..random_streams import generator
from .cifar10_recipe import CLASSES, Recipe, smoothing

SIDE = 32  # pixels of CIFAR-10


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


def read_cifar10(path: str, device: torch.device, limit: int | None = None) -> Data:
    """Both splits; limit: images of each, for trials."""
    sizes = Sizes(3, (SIDE, SIDE), (0.0,) * 3, (1.0,) * 3, CLASSES)
    splits: list[Tensor] = []
    for split in ("train", "test"):
        images, labels = load(path, sizes, split, limit)
        splits += [images.mul_(255).round_().byte().to(device), labels.to(device)]
    pixels = splits[0].float() / 255
    mean, std = (tuple(values.tolist()) for values in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))))
    return Data(splits[0], splits[1], splits[2], splits[3], mean, std)


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
        weight = torch.rand(1, generator=draw).to(pixels.device)
        pixels, targets = torch.lerp(pixels, pixels.flip(0), weight), torch.lerp(targets, targets.flip(0), weight)
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
