"""image_step from PyTorch's own operations; any device. Active patches alone are gathered, stepped and put back, as runs of p contiguous pixels."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..precision import wide
from . import reference


class Runs(NamedTuple):
    """The active pixels as M = B n C p runs of p contiguous ones. Every field is [M] or [M, 1]."""

    at: Tensor  # number of the run among those of all images, view(-1, p)
    channel: Tensor
    first: Tensor  # whether the run is the first of its image row
    last: Tensor
    above: Tensor  # [M, 1], 1 where there is an image row above, else 0
    below: Tensor
    stride: int  # runs from one image row to the next


def find_runs(index: Tensor, shape: torch.Size, patch_size: int) -> Runs:
    """The runs of patches `index` [B, n] in images of this shape [B, C, H, W], in the order patch, channel, row."""
    batch, channels, height, width = shape
    columns = width // patch_size
    cells = index.long()[..., None, None]  # [B, n, 1, 1]
    image = torch.arange(batch, device=index.device)[:, None, None, None]
    channel = torch.arange(channels, device=index.device)[:, None]
    y = cells // columns * patch_size + torch.arange(patch_size, device=index.device)  # [B, n, 1, p]
    at = ((image * channels + channel) * height + y) * columns + cells % columns  # [B, n, C, p]
    column, y, channel = (x.expand_as(at).flatten() for x in (cells % columns, y, channel))
    return Runs(at.flatten(), channel, column == 0, column == columns - 1, (y > 0)[:, None], (y < height - 1)[:, None], columns)


def line(images: Tensor, runs: Runs, at: Tensor, pixels: Tensor) -> Tensor:
    """Runs `at` with one more pixel on either side, [M, p + 2]; where the image ends, that of `pixels` [M, p], so that their difference is 0."""
    size = pixels.shape[1]
    middle, flat = images.view(-1, size).index_select(0, at), images.view(-1)
    before = flat.index_select(0, (at * size - 1).clamp_(min=0)).to(pixels.dtype)
    after = flat.index_select(0, (at * size + size).clamp_(max=flat.numel() - 1)).to(pixels.dtype)
    before, after = torch.where(runs.first, pixels[:, 0], before), torch.where(runs.last, pixels[:, -1], after)
    return torch.cat([before[:, None], middle.to(pixels.dtype), after[:, None]], dim=1)


def runs_tv_gradient(images: Tensor, norms: Tensor, runs: Runs, pixels: Tensor) -> Tensor:
    """Gradient [M, p] of the sum of the norms at the active pixels [M, p]."""
    w0, w1, w2, w3 = torch.where(norms > 0, 1 / norms, 0).to(pixels.dtype).unbind()
    here = line(images, runs, runs.at, pixels)
    grad = (2 * pixels - here[:, :-2] - here[:, 2:]).mul_(w0)
    last = images.numel() // pixels.shape[1] - 1
    for at, exists, left, right in ((runs.at - runs.stride, runs.above, w2, w3), (runs.at + runs.stride, runs.below, w3, w2)):
        there = line(images, runs, at.clamp_(0, last), pixels)
        pull = (pixels - there[:, 1:-1]).mul_(w1)
        pull += (pixels - there[:, :-2]).mul_(left)
        pull += (pixels - there[:, 2:]).mul_(right)
        grad += pull.mul_(exists)
    return grad


def adam(pixels, grad, avg, avg_sq, step, lr, beta1, beta2, eps) -> tuple[Tensor, Tensor, Tensor]:
    """New pixels and moments; the step stays on the device."""
    step = step.double()  # 1 - beta**step would cancel in float32
    avg = avg.lerp(grad, 1 - beta1)
    avg_sq = (avg_sq * beta2).addcmul_(grad, grad, value=1 - beta2)
    scale = (avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    return pixels - (avg * (lr / (1 - beta1**step))).div_(scale), avg, avg_sq


def forward(
    images: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, low: Tensor, high: Tensor, index: Tensor | None, patch_size: int,
    norms: Tensor | None, tv_weight: float, lr: float, beta1: float, beta2: float, eps: float, out: Tensor | None,
) -> None:  # fmt: skip
    """One step, as in op.py: moments in place, pixels in place or to out."""
    target = images if out is None else out
    low, high = wide(low), wide(high)
    if index is None:
        pixels, g, avg, avg_sq = (wide(x) for x in (images, grad, exp_avg, exp_avg_sq))
        low, high = low.view(-1, 1, 1), high.view(-1, 1, 1)
        tv = reference.tv_gradient(pixels, norms) if tv_weight else None
    else:
        runs = find_runs(index, images.shape, patch_size)
        pixels, g, avg, avg_sq = (wide(x.contiguous().view(-1, patch_size).index_select(0, runs.at)) for x in (images, grad, exp_avg, exp_avg_sq))
        low, high = low[runs.channel][:, None], high[runs.channel][:, None]
        tv = runs_tv_gradient(images, norms, runs, pixels) if tv_weight else None
    if tv is not None:
        g = torch.add(g, tv, alpha=tv_weight)
    moved, avg, avg_sq = adam(pixels, g, avg, avg_sq, step, lr, beta1, beta2, eps)
    for to, value in ((target, moved.clamp_(low, high)), (exp_avg, avg), (exp_avg_sq, avg_sq)):
        if index is None:
            to.copy_(value)
        else:
            to.view(-1, patch_size).index_copy_(0, runs.at, value.to(to.dtype))


tv_norms = reference.tv_norms


def tv_norms_backward(images: Tensor, norms: Tensor, grad_norms: Tensor) -> Tensor:
    """Gradient [B, C, H, W] of the images."""
    return reference.tv_gradient(wide(images), norms, grad_norms).to(images.dtype)
