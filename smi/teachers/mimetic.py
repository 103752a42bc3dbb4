"""Mimetic initialisation of a ViT: attention begins where training would bring it (Trockman and Kolter, 2023)."""

import math
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def initialise_mimetic(model: Any) -> None:
    """Set a timm VisionTransformer's weights, in place: Wq^T Wk near 0.7 I + noise, Wv^T Wp near noise - 0.4 I, sinusoidal positions.

    On small data this is worth several epochs.
    """
    d, heads = model.embed_dim, model.blocks[0].attn.num_heads
    width = d // heads

    def factors(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(product)
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
