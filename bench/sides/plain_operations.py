"""Each operation as one writes it in PyTorch, in the dtype of its arguments: what `eager` and `compiled` run, and the backends of SDPA."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(qkv: Tensor, index=None, lengths=None, scale=None) -> Tensor:
    """All tokens, heads merged; the backend is SDPA's own choice or that of `sdpa_kernel` around it."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def cls_attention(q: Tensor, kv: Tensor, scale=None) -> tuple[Tensor, Tensor]:
    keys, values = kv.permute(2, 0, 3, 1, 4)
    weights = (q.transpose(1, 2) @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
    return (weights @ values).transpose(1, 2).flatten(2), weights[:, :, 0].float().mean(1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    s = x + residual
    return F.layer_norm(s, s.shape[-1:], weight, bias, eps), s


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "gelu") -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh" if activation == "gelu_tanh" else "none")


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gamma=None) -> Tensor:
    y = F.linear(x, weight, bias)
    return residual + (y if gamma is None else y * gamma)


def patch_embed(images, index, weight, bias, position, prefix, augmentation: tuple[int, int, int], patch_size: int) -> Tensor:
    """Roll, flip, convolve every patch, add positions, gather the active tokens. augmentation: numbers, as research code has them."""
    dy, dx, flip = augmentation
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    images = images.roll((dy, dx), (2, 3))
    images = images.flip(3) if flip else images
    tokens = F.conv2d(images, weight.view(-1, images.shape[1], patch_size, patch_size), bias, stride=patch_size).flatten(2).transpose(1, 2)
    down, right = ((2 * offset + patch_size) // (2 * patch_size) for offset in (dy, dx))
    row, column = (index // columns + down) % rows, (index % columns + right) % columns
    cells = (row * columns + (columns - 1 - column if flip else column)).long()
    tokens = (tokens + position).gather(1, cells[..., None].expand(-1, -1, tokens.shape[2]))
    return torch.cat([prefix.expand(len(images), -1, -1), tokens], 1)


def tv_norms(images: Tensor) -> Tensor:
    a, b, c, d = images[..., 1:, 1:], images[..., :-1, 1:], images[..., 1:, :-1], images[..., :-1, :-1]
    wide, high = images[..., :-1] - images[..., 1:], images[..., :-1, :] - images[..., 1:, :]
    return torch.stack([wide.norm(), high.norm(), (d - a).norm(), (c - b).norm()])


def image_step(images, grad, exp_avg, exp_avg_sq, step, low, high, norms, tv_weight, lr=0.25, betas=(0.5, 0.99), eps=1e-8) -> None:
    """The gradient of the total variation by autograd, then Adam and clipping on all pixels, in place."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        grad = grad + tv_weight * torch.autograd.grad(tv_norms(leaf).sum(), leaf)[0]
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    size, scale = lr / (1 - betas[0] ** step), (1 - betas[1] ** step).sqrt()
    images.sub_(size * exp_avg / (exp_avg_sq.sqrt() / scale + eps))
    torch.clamp(images, low.view(-1, 1, 1), high.view(-1, 1, 1), out=images)


def sdpa(backend: str) -> Callable:
    """`attention` held to one SDPA backend: FLASH_ATTENTION, EFFICIENT_ATTENTION or CUDNN_ATTENTION."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(qkv: Tensor, index=None, lengths=None, scale=None) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return attention(qkv, index, lengths, scale)

    return run
