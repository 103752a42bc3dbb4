"""Total variation, Adam and clipping of the optimised pixels: the definition.

Total variation of a batch x [B, C, H, W] is the sum of four L2 norms, each over the WHOLE batch, of the differences

    d0 = x[.., j] - x[.., j+1]            along the width
    d1 = x[i, ..] - x[i+1, ..]            along the height
    d2 = x[i, j] - x[i+1, j+1]            along one diagonal
    d3 = x[i+1, j] - x[i, j+1]            along the other

and its gradient is  sum_k (adjoint of difference k)(d_k) / ||d_k||.  Adam (Kingma & Ba, algorithm 1, bias-corrected) then moves
the active pixels, and each channel is clipped to the range of valid images. Pixels of patches that left are frozen:
neither they nor their moments change.
"""

import torch
from torch import Tensor

from ..precision import wide


def differences(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First differences of [B, C, H, W] along width, height and the two diagonals."""
    return (
        images[..., :, :-1] - images[..., :, 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., :-1, :-1] - images[..., 1:, 1:],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )


def tv_norms(images: Tensor) -> Tensor:
    """The four norms [4] of `differences`, float32 or wider; their sum is the total variation. Differentiable."""
    return torch.stack([torch.linalg.vector_norm(d) for d in differences(wide(images))])


def tv_gradient(images: Tensor, norms: Tensor, weights: Tensor | None = None) -> Tensor:
    """Gradient [B, C, H, W] of the sum of the norms, each times its weight where there are `weights` [4]; a norm of zero contributes zero."""
    grad = torch.zeros_like(images)
    weights = torch.ones_like(norms) if weights is None else weights
    d0, d1, d2, d3 = (torch.where(n > 0, w / n * d, 0) for d, n, w in zip(differences(images), norms, weights, strict=True))
    grad[..., :, :-1] += d0
    grad[..., :, 1:] -= d0
    grad[..., :-1, :] += d1
    grad[..., 1:, :] -= d1
    grad[..., :-1, :-1] += d2
    grad[..., 1:, 1:] -= d2
    grad[..., 1:, :-1] += d3
    grad[..., :-1, 1:] -= d3
    return grad


def pixel_mask(index: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Which pixels belong to the patches `index` int [B, n]: bool [B, 1, H, W]."""
    rows, columns = grid
    cells = torch.zeros(index.shape[0], rows * columns, dtype=torch.bool, device=index.device).scatter_(1, index.long(), True)
    return cells.view(-1, 1, rows, columns).repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)


@torch.no_grad()
def image_step(
    images: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    low: Tensor,
    high: Tensor,
    index: Tensor | None = None,
    patch_size: int = 16,
    norms: Tensor | None = None,
    tv_weight: float = 0.0,
    lr: float = 0.25,
    betas: tuple[float, float] = (0.5, 0.99),
    eps: float = 1e-8,
    out: Tensor | None = None,
) -> None:
    """One update of the pixels, in place, or from images to out.

    images, grad, exp_avg, exp_avg_sq: [B, C, H, W]; images and the two moments are updated. step: int scalar tensor, 1 for the
    first update. low, high: [C], valid range per channel. index: int [B, n], the patches that are active; None updates all pixels.
    norms: [4] from `tv_norms`, needed where tv_weight is not 0: tv_weight times the gradient of the total variation is added to grad.
    out: like images; receives the active pixels, and images stay as they are.
    """
    old, grad = wide(images), wide(grad)
    if tv_weight:
        grad = grad + tv_weight * tv_gradient(old, norms)
    beta1, beta2 = betas
    avg = beta1 * wide(exp_avg) + (1 - beta1) * grad
    avg_sq = beta2 * wide(exp_avg_sq) + (1 - beta2) * grad * grad
    step = step.double()  # 1 - beta**step would cancel in float32
    moved = old - lr * (avg / (1 - beta1**step)) / ((avg_sq / (1 - beta2**step)).sqrt() + eps)
    moved = moved.clamp(low.view(-1, 1, 1), high.view(-1, 1, 1))
    if index is None:
        active = torch.ones(1, dtype=torch.bool, device=images.device)
    else:
        active = pixel_mask(index, (images.shape[2] // patch_size, images.shape[3] // patch_size), patch_size)
    for target, value in ((images if out is None else out, moved), (exp_avg, avg), (exp_avg_sq, avg_sq)):
        target.copy_(torch.where(active, value.to(target.dtype), target))
