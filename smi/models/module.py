"""A classifier that runs as it is: any module from pixels [B, C, H, W] to logits, differentiated by autograd, its weights frozen.

Nothing of it is described, so nothing can be computed otherwise than it does. It reads whole images: only dense inversion works on it.
"""

import copy
import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..surroundings import evaluating, neutral, seeded, uncompiled
from .description import Pixels
from .proof import PLAIN, refuse_nan
from .unwrap import peel
from .view import View
from .vit import statistics

PATCH, SMALLEST_PATCH = 16, 8  # pixels
IMAGES = 2


@dataclass(frozen=True, eq=False)
class Classifier(Pixels):
    """A module and what images it takes. The patches are those of the container of its images: the module knows of none."""

    name: str
    network: nn.Module
    image_size: tuple[int, int]  # pixels: height, width
    patch_size: int  # pixels, divides both sides
    channels: int
    num_classes: int
    mean: tuple[float, ...]  # of the training images, per channel, as fractions of white
    std: tuple[float, ...]
    flip: bool  # whether a mirror image keeps its class
    view: View = View()  # what of a picture it sees

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return _one_weight(self.network).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return _one_weight(self.network).dtype

    def to(self, device: torch.device | str, dtype: torch.dtype, copy: bool = True) -> "Classifier":
        """With a module of its own, frozen and in evaluation mode, which no longer follows the caller's."""
        return replace(self, network=_copied(self.network).to(device, dtype).eval().requires_grad_(False))

    def forward(self, images: Tensor, augmentation: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W], rolled and flipped by augmentation int [3] (dy, dx, flip). Differentiable in the images."""
        return self.network(augmented(images, augmentation))

    def weight_hash(self) -> str:
        """SHA-256 over names, shapes and values (as float32): which weights a run was made with."""
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def structure_hash(self) -> str:
        """SHA-256 over all that is no weight, the name apart: classes of the modules, their plain attributes, image size, normalisation."""
        parts = [
            (path, type(module).__qualname__, sorted((k, v) for k, v in vars(module).items() if k != "training" and isinstance(v, PLAIN)))
            for path, module in self.network.named_modules()
        ]
        about = (self.image_size, self.patch_size, self.channels, self.num_classes, self.mean, self.std, self.flip, self.view)
        return hashlib.sha256(repr((parts, about)).encode()).hexdigest()


def augmented(images: Tensor, augmentation: Tensor) -> Tensor:
    """Images [B, C, H, W] rolled by (dy, dx) pixels and then flipped, by augmentation int [3] that is read on the device. Differentiable."""
    height, width = images.shape[2:]
    dy, dx, flip = augmentation.to(images.device).unbind()
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    columns = torch.where(flip.bool(), width - 1 - columns, columns)
    return images.index_select(2, (rows - dy) % height).index_select(3, (columns - dx) % width)


def classifier(
    model: nn.Module,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    flip: bool | None = None,
    image_size: tuple[int, int] | None = None,
) -> Classifier:
    """What images a module takes, and that it gives logits with a gradient in their pixels. Raises InputError with the reason where it does not.

    What is None is read from the model: `pretrained_cfg`, the image size of a patch embedding, the first convolution. Statistics that nobody tells
    are empty: `with_statistics` refuses those.
    """
    model = peel(model)
    if not any(weight.is_meta for weight in model.parameters()):
        refuse_nan(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    size = image_size or _image_size(model, cfg)
    if size is None:
        raise InputError("its image size is not known: pass image_size=(height, width)")
    if getattr(model, "num_classes", 1) == 0:
        raise InputError("it has no classifier head (num_classes is 0)")
    if not any(True for _ in model.parameters()):
        raise InputError("it has no weights")
    convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = convolution.in_channels if convolution is not None else len(mean or cfg.get("mean") or ()) or 3
    mean, std = (tuple(own or () if given is None else given) for given, own in ((mean, cfg.get("mean")), (std, cfg.get("std"))))
    return Classifier(
        name=cfg.get("architecture") or type(model).__name__,
        network=model,
        image_size=size,
        patch_size=patch_size_for(size),
        channels=channels,
        num_classes=_ask(model, channels, size),
        mean=mean,
        std=std,
        flip=cfg.get("flip", True) if flip is None else flip,
        view=View.of(cfg),
    )


def with_statistics(found: Classifier) -> Classifier:
    """The same; raises InputError where mean and std are not one value a channel."""
    mean, std = statistics(found.channels, found.mean or None, found.std or None)
    return replace(found, mean=mean, std=std)


def patch_size_for(size: tuple[int, int]) -> int:
    """Pixels of the container's patches: 16 where that divides both sides, else the smallest common divisor from 8 on, else the largest of all."""
    common = math.gcd(*size)
    divisors = [number for number in range(1, common + 1) if common % number == 0]
    return PATCH if PATCH in divisors else min((number for number in divisors if number >= SMALLEST_PATCH), default=common)


def _image_size(model: Any, cfg: Any) -> tuple[int, int] | None:
    own = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "img_size", None)
    told: Any = own if isinstance(own, tuple | list) and len(own) == 2 else (cfg.get("input_size") or ())[1:]
    return (int(told[0]), int(told[1])) if len(told) == 2 else None


def _one_weight(model: nn.Module) -> Tensor:
    return next((weight for weight in model.parameters() if weight.is_floating_point()), next(model.parameters()))


def _copied(model: nn.Module) -> Any:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # locks, files, weights that are results of operations
        raise InputError(f"{type(model).__name__} cannot be copied: {_first_line(error)}") from error


def _ask(model: nn.Module, channels: int, size: tuple[int, int]) -> int:
    """Width of the logits. A model without numbers (on the device meta) is believed."""
    weight = _one_weight(model)
    told = getattr(model, "num_classes", None)
    if weight.device.type == "meta" and isinstance(told, int):
        return told
    images = torch.randn(IMAGES, channels, *size, generator=torch.Generator().manual_seed(0)).to(weight).requires_grad_()
    with neutral(), seeded(0, weight.device), evaluating(model), uncompiled():
        try:
            logits: Any = model(images)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a module of anybody's
            raise InputError(f"it cannot be asked for logits of images {[channels, *size]} ({_first_line(error)})") from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != IMAGES:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"its answer must be logits [{IMAGES}, classes], got {got}")
        if not torch.isfinite(logits).all():
            raise InputError("its logits of random images are NaN or infinite")
        grad = torch.autograd.grad(logits.sum(), images, allow_unused=True)[0] if logits.requires_grad else None
    if grad is None or not torch.isfinite(grad).all():
        raise InputError("its logits have no finite gradient in the pixels")
    return logits.shape[1]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
