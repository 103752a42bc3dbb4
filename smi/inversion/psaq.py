"""PSAQ-ViT (Li et al., ECCV 2022): images whose patches a ViT attends to in as many different ways as in real ones.

Per block, y_i is the attention output of patch i before the projection, averaged over heads, and s_ij = cos(y_i, y_j). Over the points x_1 .. x_10,
evenly spaced from the smallest to the largest s of the batch, every image has the density

    p_k = mean over i, j of  exp(-(s_ij - x_k)^2 / (2 h^2)) / sqrt(2 pi h^2)  +  1e-4,    h = 0.01

and the differential entropy H = integral of -p log p (trapezoids). The loss is minus the sum over blocks of the mean H over images, beside
cross-entropy and 0.05 |TV - r|, with r drawn once.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.image_step import tv_norms
from . import augmentation
from .losses import cross_entropy

ITERATIONS = 1000  # two phases of 500
LEARNING_RATE = 0.20
BETAS = (0.5, 0.9)
JITTERS = (15, 30)  # pixels at 224, of the two phases
TV_WEIGHT = 0.05
TV_TARGET = (2500.0, 3000.0)  # for 32 images of 3 x 224 x 224
BANDWIDTH = 0.01
POINTS = 10
FLOOR = 1e-4
UNDERFLOW = -80.0  # exp of less is next to nothing beside the floor, and ten times slower on a CPU


class _Density(torch.autograd.Function):
    """Gaussian kernel density of samples [B, M] at points [K], of which [B, K, M] is never held; the points are constants."""

    @staticmethod
    def forward(ctx: Any, samples: Tensor, points: Tensor) -> Tensor:
        ctx.save_for_backward(samples, points)
        return torch.stack([_kernel(samples - point).mean(1) for point in points], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        samples, points = ctx.saved_tensors
        result = torch.zeros_like(samples)
        for point, part in zip(points, grad.unbind(1), strict=True):
            distance = samples - point
            result -= part[:, None] * _kernel(distance) * distance
        return result / (BANDWIDTH**2 * samples.shape[1]), None


def _kernel(distance: Tensor) -> Tensor:
    exponent = distance.square().mul_(-1 / (2 * BANDWIDTH**2)).clamp_(min=UNDERFLOW)
    return exponent.exp_().mul_(1 / math.sqrt(2 * math.pi * BANDWIDTH**2))


def block_entropy(attention_output: Tensor) -> Tensor:
    """Differential entropy [B] of the patch similarities in one block; attention_output: [B, n, heads, width], patches only."""
    patches = F.normalize(attention_output.mean(2), dim=-1)
    similarities = (patches @ patches.mT).flatten(1)
    with torch.no_grad():
        low, high = similarities.aminmax()
        points = low + (high - low) * torch.linspace(0, 1, POINTS, dtype=low.dtype, device=low.device)
    density = _Density.apply(similarities, points) + FLOOR
    return torch.trapezoid(-density * density.log(), points, dim=1)


def patch_similarity(images: Tensor, logits: Tensor, labels: Tensor, attention_outputs: list[Tensor]) -> Tensor:
    """Minus the entropy of the patch similarities, averaged over images, summed over blocks."""
    entropy: Any = sum(block_entropy(output).mean() for output in attention_outputs)
    return -entropy


patch_similarity.needs = "attention_outputs"  # type: ignore[attr-defined]


def losses(generator: torch.Generator) -> list:
    """The published loss: patch similarity, cross-entropy, and total variation pulled to a value that is drawn here once."""
    low, high = TV_TARGET
    target = low + (high - low) * torch.rand((), generator=generator).item()

    def total_variation_target(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        scale = math.sqrt(images.numel() / (32 * 3 * 224 * 224))  # norms grow with the square root of the number of pixels
        return TV_WEIGHT * (tv_norms(images).sum() - scale * target).abs()

    return [cross_entropy, patch_similarity, total_variation_target]


def draw_augmentation(iterations: int, image_size: tuple[int, int], generator: torch.Generator, jitter: int | None, flip: bool) -> Tensor:
    """The published table int32 [iterations, 3]: one offset for both axes, up to 15 pixels at 224 in the first half and 30 in the second."""
    if jitter is not None:
        return augmentation.draw(iterations, image_size, generator, jitter, flip)
    limits = [max(1, round(limit * min(image_size) / 224)) for limit in JITTERS]
    lengths = (iterations - iterations // 2, iterations // 2)
    offsets = [torch.randint(-limit, limit + 1, (length, 1), generator=generator) for limit, length in zip(limits, lengths, strict=True)]
    flips = torch.randint(0, 2, (iterations, 1), generator=generator) * flip
    return torch.cat([torch.cat(offsets).expand(-1, 2), flips], dim=1).int()
