"""A frozen description of a timm Vision Transformer, read from its modules.

The model is neither patched nor copied. The description holds its weights, detached unless asked otherwise, and the few facts that the engine needs.
A model for which the engine would compute something else than the model does is refused with the reason.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

Take = Callable[[Any], Any]  # a parameter as the description holds it, None where it is None


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


@dataclass(frozen=True, eq=False)
class ViT:
    """A Vision Transformer as the engine sees it: d embedding dimension, N patches, P prefix tokens (CLS, distillation, registers)."""

    name: str
    image_size: tuple[int, int]  # pixels: height, width
    patch_size: int  # pixels
    channels: int
    embed: Linear  # [d, C * p * p]
    prefix: Tensor  # [P, d], position embedding included
    position: Tensor | None  # [N, d]
    norm_pre: Norm | None
    blocks: tuple[Block, ...]
    num_heads: int
    activation: str  # a name of kernels.linear_gelu
    norm: Norm | None
    pool: str  # "token" or "avg" (mean of the patches)
    fc_norm: Norm | None
    heads: tuple[Linear, ...]  # head i reads prefix token i; their logits are averaged
    mean: tuple[float, ...]  # of the training images, per channel, as fractions of white
    std: tuple[float, ...]
    flip: bool  # whether a mirror image keeps its class

    @property
    def grid(self) -> tuple[int, int]:
        """Patches: rows, columns."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, of a whole image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix(self) -> int:
        """P, tokens in front of the patches."""
        return self.prefix.shape[0]

    @property
    def num_classes(self) -> int:
        """Width of the logits."""
        return self.heads[0].weight.shape[0]

    @property
    def embed_dim(self) -> int:
        """d, width of a token."""
        return self.embed.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.embed.weight.device

    def valid_range(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest normalised value of a valid image, each [C]: (0 - mean) / std and (1 - mean) / std."""
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.mean, self.std))
        return -mean / std, (1 - mean) / std

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "ViT":
        """The same description with its weights on another device or in another dtype."""
        return _map_tensors(self, lambda tensor: tensor.to(device, dtype))

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


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to every tensor in its dataclasses and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, function) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _map_tensors(getattr(value, field.name), function) for field in fields(value)})
    return value


def describe(
    model: nn.Module, *, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None, flip: bool | None = None, frozen: bool = True
) -> ViT:
    """The description of a timm `VisionTransformer` or `VisionTransformerDistilled`.

    mean, std: of the training images per channel, as fractions of white. flip: whether mirror images keep their class. None: from the model's
    `pretrained_cfg`. frozen: detach the weights; False keeps them in the autograd graph, to train a student. Raises InputError with the reason for a
    model that is not supported.
    """
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise InputError(f"{type(model).__name__} is not supported: pass a timm VisionTransformer or distilled DeiT with a CLS token")
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    refuse_unsupported(model, name)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    mean, std = cfg.get("mean") if mean is None else mean, cfg.get("std") if std is None else std
    return _read(model, name, mean, std, flip=cfg.get("flip", True) if flip is None else flip, frozen=frozen)


def _read(model: Any, name: str, mean: Sequence[float] | None, std: Sequence[float] | None, *, flip: bool, frozen: bool) -> ViT:
    take: Take = (lambda p: None if p is None else p.detach()) if frozen else (lambda p: p)
    distilled = hasattr(model, "dist_token")
    tokens = [model.cls_token, *([model.dist_token] if distilled else []), *([] if model.reg_token is None else [model.reg_token])]
    prefix = torch.cat([take(token)[0] for token in tokens])
    position = None if model.pos_embed is None else take(model.pos_embed)[0]
    if position is not None and not model.no_embed_class:
        prefix, position = prefix + position[: len(prefix)], position[len(prefix) :]
    for head in [model.head, *([model.head_dist] if distilled else [])]:
        if type(head) is not nn.Linear:
            raise InputError(f"{name} is not supported: its classifier head {type(head).__name__} is not a plain Linear")
    embed = model.patch_embed.proj
    mean, std = _statistics(embed.in_channels, mean, std)
    return ViT(
        name=name,
        image_size=tuple(model.patch_embed.img_size),
        patch_size=embed.kernel_size[0],
        channels=embed.in_channels,
        embed=Linear(take(embed.weight).flatten(1), take(embed.bias)),
        prefix=prefix,
        position=position,
        norm_pre=_norm(model.norm_pre, take),
        blocks=tuple(_block(block, take) for block in model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        activation=_activation(model.blocks[0].mlp.act),
        norm=_norm(model.norm, take),
        pool=model.global_pool,
        fc_norm=None if distilled else _norm(model.fc_norm, take),
        heads=tuple(_linear(head, take) for head in ([model.head, model.head_dist] if distilled else [model.head])),
        mean=mean,
        std=std,
        flip=flip,
    )


def refuse_unsupported(model: Any, name: str) -> None:
    """Raise InputError with the first reason for which the engine would not compute what this timm VisionTransformer does."""
    patch_embed, blocks = model.patch_embed, list(model.blocks)
    embed: Any = getattr(patch_embed, "proj", None)
    reasons = [
        (type(patch_embed).__name__ != "PatchEmbed" or not isinstance(embed, nn.Conv2d), "its patch embedding is not a single convolution"),
        (model.cls_token is None, "it has no CLS token"),
        (model.num_classes <= 0, "it has no classifier head (num_classes is 0)"),
        (model.global_pool not in ("token", "avg") or model.attn_pool is not None, f"its pooling '{model.global_pool}' is neither 'token' nor 'avg'"),
        (getattr(model, "pool_include_prefix", False), "its pooling averages prefix tokens"),
        (not blocks, "it has no blocks"),
        (hasattr(model, "dist_token") and model.reg_token is not None, "it has both distillation and register tokens"),
    ]
    for wrong, reason in reasons:
        if wrong:
            raise InputError(f"{name} is not supported: {reason}")
    height, width = patch_embed.img_size
    patch = embed.kernel_size[0]
    reasons = [
        (embed.kernel_size != (patch, patch) or embed.stride != (patch, patch), "its patches are not square and disjoint"),
        (height % patch or width % patch, f"its image size {height}x{width} is not a multiple of its patch size {patch}"),
        (_is_norm(patch_embed.norm), "its patch embedding is normalised"),
        *((True, f"block {i}: {why}") for i, block in enumerate(blocks) if (why := _unsupported_block(block, blocks[0]))),
    ]
    for wrong, reason in reasons:
        if wrong:
            raise InputError(f"{name} is not supported: {reason}")


def _unsupported_block(block: Any, first: Any) -> str | None:
    """Why a block is not the pre-norm block of the original ViT with its optional layer scale and query-key normalisation."""
    if type(block).__name__ != "Block":
        return f"{type(block).__name__} is not the standard pre-norm block"
    attention, mlp = block.attn, block.mlp
    if type(attention).__name__ != "Attention":
        return f"{type(attention).__name__} is not standard self-attention"
    if getattr(attention, "gate", None) is not None or _is_norm(getattr(attention, "norm", None)):
        return "its attention output is gated or normalised"
    if attention.num_heads != first.attn.num_heads:
        return "its number of heads differs from the first block's"
    if type(mlp).__name__ != "Mlp" or _is_norm(getattr(mlp, "norm", None)):
        return f"{type(mlp).__name__} is not the standard two-layer MLP"
    if type(mlp.act) is not type(first.mlp.act) or _activation(mlp.act) is None:
        return f"its activation {type(mlp.act).__name__} is not GELU, tanh GELU or QuickGELU"
    if not (_is_norm(block.norm1) and _is_norm(block.norm2)):
        return "it does not normalise before attention and MLP"
    norms = (block.norm1, block.norm2, attention.q_norm, attention.k_norm)
    for module in norms:
        if _is_norm(module) and not isinstance(module, nn.LayerNorm):
            return f"its normalisation {type(module).__name__} is not LayerNorm"
    for module in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2):
        if type(module) is not nn.Linear:
            return f"its {type(module).__name__} layer is not a plain Linear"
    return None


def _is_norm(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _activation(act: Any) -> Any:
    """The name that kernels.linear_gelu gives to an activation module; None where it has none."""
    if isinstance(act, nn.GELU) or type(act).__name__ == "GELU":
        return "gelu_tanh" if getattr(act, "approximate", "none") == "tanh" else "gelu"
    return {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}.get(type(act).__name__)


def _linear(module: Any, take: Take) -> Linear:
    return Linear(take(module.weight), take(module.bias))


def _norm(module: Any, take: Take) -> Any:
    """A Norm, or None where the module is an identity."""
    if not _is_norm(module):
        return None
    if not isinstance(module, nn.LayerNorm) or module.weight is None:
        raise InputError(f"normalisation {type(module).__name__} is not supported: only LayerNorm with a weight is")
    return Norm(take(module.weight), take(module.bias), module.eps)


def _block(block: Any, take: Take) -> Block:
    attention, mlp = block.attn, block.mlp
    scale1, scale2 = (take(scale.gamma) if _is_norm(scale) else None for scale in (block.ls1, block.ls2))
    return Block(
        norm1=_norm(block.norm1, take),
        qkv=_linear(attention.qkv, take),
        q_norm=_norm(attention.q_norm, take),
        k_norm=_norm(attention.k_norm, take),
        proj=_linear(attention.proj, take),
        scale1=scale1,
        norm2=_norm(block.norm2, take),
        fc1=_linear(mlp.fc1, take),
        fc2=_linear(mlp.fc2, take),
        scale2=scale2,
    )


def _statistics(channels: int, mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and std as tuples of `channels` floats; raises InputError where they do not fit the model."""
    for name, values in (("mean", mean), ("std", std)):
        if values is None or len(values) != channels:
            given = "no" if values is None else len(values)
            raise InputError(f"the model has {channels} channels, but {given} values of {name} are known: pass {name}= with {channels} values")
    if min(std) <= 0:
        raise InputError(f"std must be positive, got {tuple(std)}")
    return tuple(map(float, mean)), tuple(map(float, std))
