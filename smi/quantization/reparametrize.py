"""LayerNorm channels brought to one range, in a copy of a model whose answers stay the same: the scale reparametrisation of RepQ-ViT.

The channels of a LayerNorm's output differ in range by factors of ten and more, so that one scale for all wastes most codes. Each channel c, seen
from low_c to high_c, is mapped to the range that is the mean of all: with s_c = high_c - low_c, s the mean of s_c, l = -s mean(-low_c / s_c),

    x'_c = (x_c - low_c) s / s_c + l

which the LayerNorm's scale and bias do, and the linear layer behind it takes back: W'_c = W_c s_c / s, b' = b + sum_c W_c (low_c - l s_c / s).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .export import Tokens

NARROW = 1e-3  # of the mean range: a channel below it is taken to be as wide


def reparametrize(tokens: Tokens, images: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Change LayerNorms and the layers behind them in place. images: batches of (patches, index) that the ranges are read from."""
    pairs = [pair for block in tokens.blocks for pair in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1))]
    with torch.no_grad():
        with _watching([norm for norm, _ in pairs]) as seen:
            for patches, index in images:
                tokens(patches, index)
        for (norm, linear), (low, high) in zip(pairs, seen, strict=True):
            _map(norm, linear, low.double(), high.double())


@contextmanager
def _watching(norms: list[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """The least and the greatest value of every channel of the outputs of some modules."""
    seen: list[list[Tensor]] = [[] for _ in norms]

    def watch(i: int, x: Tensor) -> None:
        low, high = x.flatten(0, -2).aminmax(dim=0)
        seen[i] = [torch.minimum(seen[i][0], low), torch.maximum(seen[i][1], high)] if seen[i] else [low, high]

    hooks = [norm.register_forward_hook(lambda _, __, x, i=i: watch(i, x)) for i, norm in enumerate(norms)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _map(norm: Any, linear: Any, low: Tensor, high: Tensor) -> None:
    width = high - low
    width = torch.maximum(width, NARROW * width.mean())
    mean = width.mean()
    start = mean * (low / width).mean()
    weight, bias = linear.weight.double(), 0 if linear.bias is None else linear.bias.double()
    linear.bias = _frozen(bias + weight @ (low - start * width / mean))
    linear.weight = _frozen(weight * (width / mean))
    before = torch.zeros_like(low) if norm.bias is None else norm.bias.double()
    norm.bias = _frozen((before - low) * mean / width + start)
    norm.weight = _frozen((1 if norm.weight is None else norm.weight.double()) * mean / width)


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.float(), requires_grad=False)
