"""What the engine knows of a Vision Transformer: its weights, and the few facts beside them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .view import View


@dataclass(frozen=True, eq=False)
class Linear:
    """x weight^T + bias."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


@dataclass(frozen=True, eq=False)
class Norm:
    """LayerNorm over the last axis."""

    weight: Tensor  # [d]
    bias: Tensor | None  # [d]
    eps: float


@dataclass(frozen=True, eq=False)
class Block:
    """x += scale1 * proj(attention(qkv(norm1(x)))), then x += scale2 * fc2(f(fc1(norm2(x))))."""

    norm1: Norm
    qkv: Linear
    q_norm: Norm | None  # over the head width
    k_norm: Norm | None
    proj: Linear
    scale1: Tensor | None  # [d], the layer scale
    norm2: Norm
    fc1: Linear
    fc2: Linear
    scale2: Tensor | None
    num_heads: int
    activation: str  # f, a name of kernels.linear_gelu

    @property
    def width(self) -> int:
        """Of attention's output: all heads side by side."""
        return self.proj.weight.shape[1]

    @property
    def hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.fc1.weight.shape[0]


class Pixels:
    """What images a model takes, whatever computes its logits."""

    image_size: tuple[int, int]
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches: rows, columns."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, of a whole image."""
        return self.grid[0] * self.grid[1]

    def valid_range(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest normalised value of a valid image, each [C]: (0 - mean) / std and (1 - mean) / std."""
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.mean, self.std))
        return -mean / std, (1 - mean) / std


@dataclass(frozen=True, eq=False)
class ViT(Pixels):
    """A Vision Transformer as the engine sees it: d embedding dimension, N patches, P prefix tokens (CLS, distillation, registers)."""

    name: str
    image_size: tuple[int, int]  # pixels: height, width
    patch_size: int  # pixels
    channels: int
    embed: Linear  # [d, C * p * p]
    prefix: Tensor  # [P, d], position embedding included
    position: Tensor | None  # [N, d]
    norm_pre: Norm | None
    blocks: tuple[Block, ...]  # their widths and numbers of heads may differ
    norm: Norm | None
    pool: str  # "token" or "avg" (mean of the patches)
    fc_norm: Norm | None
    heads: tuple[Linear, ...]  # head i reads prefix token i; their logits are averaged
    mean: tuple[float, ...]  # of the training images, per channel, as fractions of white; empty where it is not known and plays no part
    std: tuple[float, ...]
    flip: bool  # whether a mirror image keeps its class
    normalises: bool = False  # whether the model takes fractions of white and normalises them itself
    view: View = View()  # what of a picture it sees

    @property
    def num_prefix(self) -> int:
        """P, tokens in front of the patches."""
        return self.prefix.shape[0]

    @property
    def num_classes(self) -> int:
        """Width of the logits."""
        return self.heads[0].weight.shape[0]

    @property
    def num_heads(self) -> int:
        """Of the first block."""
        return self.blocks[0].num_heads

    @property
    def activation(self) -> str:
        """Of the first block."""
        return self.blocks[0].activation

    @property
    def embed_dim(self) -> int:
        """d, width of a token."""
        return self.embed.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embed.weight.dtype

    def to(self, device: torch.device | str, dtype: torch.dtype, copy: bool = False) -> "ViT":
        """The same description with its weights on another device or in another dtype; copy: they never follow the model's."""
        return _map_tensors(self, lambda tensor: tensor.to(device, dtype, copy=copy))

    def copy(self) -> "ViT":
        """The same description with weights of its own, which no longer follow the model's."""
        return _map_tensors(self, torch.clone)

    def tensors(self) -> list[Tensor]:
        """All weights, in the order of the fields."""
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        _map_tensors(self, keep)
        return found

    def weight_hash(self) -> str:
        """SHA-256 over shapes and values (as float32): which weights a run was made with."""
        digest = hashlib.sha256()
        for tensor in self.tensors():
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def structure_hash(self) -> str:
        """SHA-256 over all that is no weight, the name apart: activations, heads, epsilons, pooling, normalisation."""
        return hashlib.sha256(repr(replace(_map_tensors(self, lambda tensor: None), name="")).encode()).hexdigest()


def _map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """`value` with `function` applied to every tensor in its dataclasses and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, function) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _map_tensors(getattr(value, field.name), function) for field in fields(value)})
    return value
