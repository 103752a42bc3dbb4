"""What every quantised ViT shares: the facts that images must fit, and the ways they can be given."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..images.patches import to_patches
from ..images.sparse_images import SparseImages
from ..models.vit import ViT
from .recipe import Recipe

Images = Tensor | SparseImages | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Facts:
    """What a quantised ViT takes and gives, and how it was quantised; plain data for a JSON file."""

    name: str
    grid: tuple[int, int]  # patches: rows, columns
    patch_size: int  # pixels
    channels: int
    num_classes: int
    architecture: dict  # of `_architecture`
    recipe: Recipe

    @staticmethod
    def of(vit: ViT, recipe: Recipe) -> "Facts":
        return Facts(vit.name, vit.grid, vit.patch_size, vit.channels, vit.num_classes, _architecture(vit), recipe)

    @staticmethod
    def from_json(data: dict) -> "Facts":
        return Facts(**{**data, "grid": tuple(data["grid"]), "recipe": Recipe(**data["recipe"])})

    def to_json(self) -> dict:
        return asdict(self)

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels: height, width."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    def linears(self) -> list[str]:
        """Names of the linear layers in the order in which they run."""
        blocks = range(self.architecture["depth"])
        inner = [f"blocks.{i}.{layer}" for i in blocks for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        return ["embed", *inner, *(f"heads.{i}" for i in range(self.architecture["heads"]))]


def _architecture(vit: ViT) -> dict:
    """What the tensors of a ViT do not tell of it: counts, and the epsilon of every LayerNorm by its name in the model."""
    norms = {"norm_pre": vit.norm_pre, "norm": vit.norm, "fc_norm": vit.fc_norm}
    for i, block in enumerate(vit.blocks):
        norms.update({f"blocks.{i}.{name}": getattr(block, name) for name in ("norm1", "norm2")})
        norms.update({f"blocks.{i}.attn.{name}": getattr(block, name) for name in ("q_norm", "k_norm")})
    return {
        "depth": len(vit.blocks),
        "num_heads": vit.num_heads,
        "prefix": vit.num_prefix,
        "heads": len(vit.heads),
        "pool": vit.pool,
        "activation": vit.activation,
        "eps": {name: norm.eps for name, norm in norms.items() if norm is not None},
    }


class QuantizedViT(nn.Module):
    """Logits [B, classes] of images in any of their forms; subclasses say how from patches."""

    def __init__(self, facts: Facts):
        super().__init__()
        self.facts = facts

    def forward(self, images: Images) -> Tensor:
        """images: normalised pixels [B, C, H, W], SparseImages, or (patches [B, n, C, p, p], index int64 [B, n])."""
        patches, index = as_patches(self.facts, images)
        return self.logits(patches, index) if len(patches) else torch.empty(0, self.facts.num_classes)

    def logits(self, patches: Tensor, index: Tensor) -> Tensor:
        raise NotImplementedError

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.facts.name}, {self.facts.recipe}"


def as_patches(facts: Facts, images: Images) -> tuple[Tensor, Tensor]:
    """Patches [B, n, C, p, p] and their cells [B, n]; raises InputError where the images are for another model."""
    name, (rows, columns) = facts.name, facts.grid
    if isinstance(images, SparseImages):
        if images.grid != facts.grid:
            raise InputError(f"{name} has a {rows}x{columns} grid of patches, these images are on {images.grid[0]}x{images.grid[1]}")
        if len(images) and not 0 <= int(images.labels.min()) <= int(images.labels.max()) < facts.num_classes:
            raise InputError(f"{name} has {facts.num_classes} classes, these images have labels up to {int(images.labels.max())}: made for another")
        patches, index = images.patches, images.index
    elif isinstance(images, Tensor):
        wanted = (facts.channels, *facts.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted or not images.dtype.is_floating_point:
            kind = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise InputError(f"{name} takes images [B, {', '.join(map(str, wanted))}] of normalised pixels, these are {kind}")
        patches = to_patches(images, facts.patch_size)
        index = torch.arange(rows * columns, device=images.device).expand(len(images), -1)
    else:
        patches, index = _checked_pair(facts, images)
    wanted = (facts.channels, facts.patch_size, facts.patch_size)
    if tuple(patches.shape[2:]) != wanted:
        raise InputError(f"{name} takes patches {list(wanted)}, these are {list(patches.shape[2:])}")
    return patches, index.long()


def _checked_pair(facts: Facts, pair: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)):
        raise InputError("images must be SparseImages, a tensor [B, C, H, W] of normalised pixels, or (patches [B, n, C, p, p], index [B, n])")
    patches, index = pair
    cells = facts.grid[0] * facts.grid[1]
    if patches.ndim != 5 or patches.shape[:2] != index.shape or index.dtype.is_floating_point:
        raise InputError(f"patches [B, n, C, p, p] and whole numbers index [B, n] must fit, got {list(patches.shape)} and {list(index.shape)}")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < cells:
        raise InputError(f"index must name cells of the {facts.grid[0]}x{facts.grid[1]} grid, 0 to {cells - 1}")
    return patches, index


def batches(patches: Tensor, index: Tensor, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """At most `size` images at a time, as the model's device and dtype want them."""
    for some, cells in zip(patches.split(size), index.split(size), strict=True):
        yield some.to(device, torch.float32), cells.to(device)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 64) -> float:
    """Fraction of normalised images [N, C, H, W] that a model, quantised or not, assigns to their labels [N]."""
    if not len(images) or len(images) != len(labels):
        raise InputError(f"an evaluation needs images and one label for each, got {len(images)} images and {len(labels)} labels")
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with torch.no_grad():
        right = [
            (model(some.to(device)).argmax(1).cpu() == wanted).sum().item()
            for some, wanted in zip(images.split(batch_size), labels.split(batch_size), strict=True)
        ]
    return sum(right) / len(images)
