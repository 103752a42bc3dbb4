"""The reference engine: plain autograd through the definitions of the operations, on sequences that are really shorter.

It is the specification: any dtype including float64, any device, nothing fused.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention.reference import attention
from ..kernels.cls_attention.reference import cls_attention
from ..kernels.layer_norm.reference import layer_norm
from ..kernels.linear_gelu.reference import linear_gelu
from ..kernels.linear_residual.reference import linear_residual
from ..kernels.patch_embed.reference import patch_embed
from ..models.description import Block, Linear, Norm, ViT


@dataclass(frozen=True, eq=False)
class Output:
    """What a forward pass gives."""

    logits: Tensor  # [B, classes]
    attention: Tensor  # [B, n], what the CLS token pays to each patch in the last block, mean over heads; no gradient


def forward(vit: ViT, images: Tensor, index: Tensor, augmentation: Tensor | None = None, attention_outputs: list[Tensor] | None = None) -> Output:
    """The ViT on the active patches `index` int [B, n] of images [B, C, H, W], rolled and flipped by augmentation int [3] (dy, dx, flip).

    attention_outputs: a list to which every block appends attention's output for its patches, before the projection: [B, n, heads, width].
    """
    x = patch_embed(images, index, vit.embed.weight, vit.embed.bias, vit.position, vit.prefix, augmentation, vit.patch_size)
    x = _normalise(x, vit.norm_pre)
    for block in vit.blocks:
        qkv = _qkv(x, block)  # [B, T, 3, H, D]
        attended = attention(qkv)
        if attention_outputs is not None:
            attention_outputs.append(attended[:, vit.num_prefix :].unflatten(-1, (block.num_heads, -1)))
        x = _project_and_mlp(block, x, attended)
    with torch.no_grad():
        _, row = cls_attention(qkv[:, :1, 0], qkv[:, :, 1:])
    return Output(_classify(vit, _normalise(x, vit.norm)), row[:, vit.num_prefix :])


def forward_patches(vit: ViT, patches: Tensor, index: Tensor, attend: Callable[[Tensor], Tensor] = attention) -> Tensor:
    """Logits [B, classes] of the ViT on patches [B, n, C, p, p] that lie at grid cells `index` [B, n], each with its own position embedding.

    attend: from packed qkv [B, T, 3, H, D] to [B, T, H * D]; the definition, or a faster version where a student trains. The last block is
    computed for the tokens that the heads read.
    """
    tokens = F.linear(patches.flatten(2), vit.embed.weight, vit.embed.bias)
    if vit.position is not None:
        tokens = tokens + vit.position[index.long()]
    x = _normalise(torch.cat([vit.prefix.expand(len(tokens), -1, -1), tokens], dim=1), vit.norm_pre)
    *blocks, last = vit.blocks
    for block in blocks:
        x = _project_and_mlp(block, x, attend(_qkv(x, block)))
    qkv = _qkv(x, last)
    if vit.pool == "avg":
        attended = attend(qkv)
    else:
        x = x[:, : len(vit.heads)]
        attended, _ = cls_attention(qkv[:, : len(vit.heads), 0], qkv[:, :, 1:])
    return _classify(vit, _normalise(_project_and_mlp(last, x, attended), vit.norm))


def _normalise(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else layer_norm(x, norm.weight, norm.bias, norm.eps)[0]


def _qkv(x: Tensor, block: Block) -> Tensor:
    qkv = F.linear(_normalise(x, block.norm1), block.qkv.weight, block.qkv.bias).unflatten(-1, (3, block.num_heads, -1))
    if block.q_norm is None and block.k_norm is None:
        return qkv
    q, k, v = qkv.unbind(2)
    return torch.stack([_normalise(q, block.q_norm), _normalise(k, block.k_norm), v], dim=2)


def _project_and_mlp(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    """The part of a block behind its attention [B, T, H * D]: projection and MLP, each added to x."""
    x = linear_residual(attended, block.proj.weight, block.proj.bias, x, block.scale1)
    hidden = linear_gelu(_normalise(x, block.norm2), block.fc1.weight, block.fc1.bias, block.activation)
    return linear_residual(hidden, block.fc2.weight, block.fc2.bias, x, block.scale2)


def _classify(vit: ViT, x: Tensor) -> Tensor:
    if vit.pool == "avg":
        pooled = [x[:, vit.num_prefix :].mean(1)]
    else:
        pooled = [x[:, i] for i in range(len(vit.heads))]
    logits = [_linear(_normalise(token, vit.fc_norm), head) for token, head in zip(pooled, vit.heads, strict=True)]
    return torch.stack(logits).mean(0)


def _linear(x: Tensor, linear: Linear) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)
