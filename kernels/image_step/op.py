"""image_step and tv_norms: public functions, registration, gradient."""

import torch
from torch import Tensor

from ..precision import wide
from ..registration import expect, register
from . import reference

INTEGERS = (torch.int32, torch.int64)


def tv_norms(images: Tensor) -> Tensor:
    """L2 norms, each over the whole batch, of the differences along width, height and the two diagonals; their sum is the total variation.

    images: [B, C, H, W]. Returns [4], float32 or wider. Differentiable; a norm of zero has gradient zero. Raises ValueError for another shape.
    """
    got = f"{images.dtype} {tuple(images.shape)}"
    expect("tv_norms", images.is_floating_point() and images.ndim == 4, f"images must be floating point [B, C, H, W], got {got}")
    return _tv_norms(images)


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
    """Total-variation gradient, one step of Adam and clipping, in one pass over the active pixels.

    images, grad, exp_avg, exp_avg_sq: [B, C, H, W]; images and moments contiguous, written in place. step: int32 or int64 scalar, 1 for the first
    update, read on the device. low, high: [C]. index: int32 or int64 [B, n], active patches, distinct within a row; None: all pixels. norms: [4] from
    `tv_norms(images)`, needed where tv_weight is not 0. out: like images; then it receives the active pixels and images stay (the faster form with
    total variation: neighbours must be read as they were, see README.md). Raises ValueError where shapes, dtypes or memory layout do not fit.
    """
    check(images, grad, exp_avg, exp_avg_sq, out)
    channels = images.shape[1]
    expect("image_step", step.ndim == 0 and step.dtype in INTEGERS, f"step must be an int32 or int64 scalar, got {step.dtype} {tuple(step.shape)}")
    expect("image_step", low.shape == high.shape == (channels,), f"low and high must be [{channels}]")
    if index is not None:
        fits = index.dtype in INTEGERS and index.ndim == 2 and index.shape[0] == images.shape[0]
        expect("image_step", fits, f"index must be int32 or int64 [{images.shape[0]}, n]")
        whole = patch_size > 0 and images.shape[2] % patch_size == 0 and images.shape[3] % patch_size == 0
        expect("image_step", whole, f"images of {images.shape[2]} x {images.shape[3]} do not divide into patches of {patch_size}")
        if index.shape[1] * patch_size**2 == images.shape[2] * images.shape[3]:
            index = None  # every patch is active: a pass over whole images is faster
    expect("image_step", not tv_weight or (norms is not None and norms.shape == (4,)), "total variation needs norms [4], from tv_norms(images)")
    expect("image_step", all(0 <= beta < 1 for beta in betas), f"betas must lie in [0, 1), got {betas}")
    _step(images, grad, exp_avg, exp_avg_sq, step, low, high, index, patch_size, norms, tv_weight, lr, *betas, eps, out)


def check(images: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, out: Tensor | None) -> None:
    """Raise ValueError unless the image-shaped tensors fit each other and can be written in place."""
    got = f"{images.dtype} {tuple(images.shape)}"
    expect("image_step", images.is_floating_point() and images.ndim == 4, f"images must be floating point [B, C, H, W], got {got}")
    written = {"images": images, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq} | ({} if out is None else {"out": out})
    for name, tensor in ({"grad": grad} | written).items():
        expect("image_step", tensor.shape == images.shape and tensor.is_floating_point(), f"{name} must be floating point {tuple(images.shape)}")
        expect("image_step", name == "grad" or tensor.is_contiguous(), f"{name} must be contiguous")
        expect("image_step", name == "grad" or not (tensor.requires_grad and torch.is_grad_enabled()), f"{name} is written in place: detach it")
    expect("image_step", out is None or out.dtype == images.dtype, f"out must be {images.dtype}, like images")
    expect("image_step", out is not images, "out must not be images: leave it out to update in place")


def _step_fake(
    images: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    low: Tensor,
    high: Tensor,
    index: Tensor | None,
    patch_size: int,
    norms: Tensor | None,
    tv_weight: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    out: Tensor | None,
) -> None:
    """Writes exp_avg and exp_avg_sq, and images or out."""


def _tv_norms_fake(images: Tensor) -> Tensor:
    """[4], float32 or wider."""
    return images.new_empty(4, dtype=torch.promote_types(images.dtype, torch.float32))


def _tv_norms_backward_fake(images: Tensor, norms: Tensor, grad_norms: Tensor) -> Tensor:
    """Gradient [B, C, H, W] of the images."""
    return images.new_empty(images.shape)


def _step_reference(images, grad, exp_avg, exp_avg_sq, step, low, high, index, patch_size, norms, tv_weight, lr, beta1, beta2, eps, out):
    reference.image_step(images, grad, exp_avg, exp_avg_sq, step, low, high, index, patch_size, norms, tv_weight, lr, (beta1, beta2), eps, out)


def _tv_norms_backward_reference(images, norms, grad_norms):
    return reference.tv_gradient(wide(images), norms, grad_norms).to(images.dtype)


WRITTEN = ("images", "exp_avg", "exp_avg_sq", "out")
_step = register("image_step", "forward", _step_fake, _step_reference, WRITTEN)
_tv_norms = register("image_step", "tv_norms", _tv_norms_fake, reference.tv_norms)
_tv_norms_backward = register("image_step", "tv_norms_backward", _tv_norms_backward_fake, _tv_norms_backward_reference)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _differentiate(ctx, grad_norms):
    images, norms = ctx.saved_tensors
    return _tv_norms_backward(images, norms, grad_norms)


_tv_norms.register_autograd(_differentiate, setup_context=_save)
