"""patch_embed: public function, registration, gradient."""

import torch
from torch import Tensor

from ..registration import expect, gradients, refuse_trainable, register
from . import reference

INTEGERS = (torch.int32, torch.int64)


def patch_embed(
    images: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    augmentation: Tensor | None = None,
    patch_size: int = 16,
) -> Tensor:
    """Tokens of the active patches of a rolled and flipped image, prefix tokens first.

    images: [B, C, H, W] in weight's dtype or float32, H and W multiples of patch_size; index: int32 or int64 [B, n], row-major cells of the active
    patches in the still image, in range (on the CPU IndexError where they are not; on a GPU that would wait for the device) and distinct within a
    row; weight: [d, C * p * p]; bias: [d];
    position: [N, d]; prefix: [P, d]; augmentation: int32 or int64 [3], (dy, dx, flip), offsets in pixels, read on the device.
    Returns [B, P + n, d] in weight's dtype. Differentiable in images. Raises ValueError where shapes or dtypes do not fit or a weight requires a
    gradient.
    """
    check(images, index, weight, augmentation, patch_size)
    cells = (images.shape[2] // patch_size) * (images.shape[3] // patch_size)
    d = weight.shape[0]
    for name, tensor, shape in (("bias", bias, (d,)), ("position", position, (cells, d)), ("prefix", prefix, (None, d))):
        fits = tensor is None or (tensor.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)))
        expect("patch_embed", fits, f"{name} must be {['P' if s is None else s for s in shape]}")
        expect("patch_embed", tensor is None or tensor.dtype == weight.dtype, f"{name} must be {weight.dtype}, like weight")
    refuse_trainable("patch_embed", weight=weight, bias=bias, position=position, prefix=prefix)
    return _forward(images, index, weight, bias, position, prefix, augmentation, patch_size)


def check(images: Tensor, index: Tensor, weight: Tensor, augmentation: Tensor | None, patch_size: int) -> None:
    """Raise ValueError unless image, patches, weight and augmentation fit each other."""
    got = f"{images.dtype} {tuple(images.shape)}"
    expect("patch_embed", images.is_floating_point() and images.ndim == 4, f"images must be floating point [B, C, H, W], got {got}")
    batch, channels, height, width = images.shape
    whole = patch_size > 0 and height % patch_size == 0 and width % patch_size == 0
    expect("patch_embed", whole, f"images of {height} x {width} do not divide into patches of {patch_size}")
    expect("patch_embed", weight.ndim == 2 and weight.shape[1] == channels * patch_size**2, f"weight must be [d, {channels * patch_size**2}]")
    widths = images.dtype == weight.dtype or (images.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16))
    expect("patch_embed", widths, f"images must be {weight.dtype}, like weight, or float32 above 16-bit weights, not {images.dtype}")
    expect("patch_embed", index.dtype in INTEGERS and index.ndim == 2 and index.shape[0] == batch, f"index must be int32 or int64 [{batch}, n]")
    if augmentation is not None:
        fits = augmentation.dtype in INTEGERS and augmentation.shape == (3,)
        expect("patch_embed", fits, "augmentation must be int32 or int64 [3], (dy, dx, flip)")


def _forward_fake(
    images: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    augmentation: Tensor | None,
    patch_size: int,
) -> Tensor:
    """Tokens [B, P + n, d]."""
    count = 0 if prefix is None else prefix.shape[0]
    return weight.new_empty(images.shape[0], count + index.shape[1], weight.shape[0])


def _backward_fake(
    grad_tokens: Tensor,
    index: Tensor,
    weight: Tensor,
    augmentation: Tensor | None,
    patch_size: int,
    prefix: int,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient [B, C, H, W] of the images in `dtype`; prefix: number of prefix tokens."""
    return grad_tokens.new_empty(grad_tokens.shape[0], weight.shape[1] // patch_size**2, height, width, dtype=dtype)


def _backward_reference(grad_tokens, index, weight, augmentation, patch_size, prefix, height, width, dtype):
    still = grad_tokens.new_zeros(grad_tokens.shape[0], weight.shape[1] // patch_size**2, height, width, dtype=dtype)

    def tokens(images):
        return reference.patch_embed(images, index, weight, augmentation=augmentation, patch_size=patch_size)

    return gradients(tokens, [still], [grad_tokens[:, prefix:]])[0]


_forward = register("patch_embed", "forward", _forward_fake, reference.patch_embed)
_backward = register("patch_embed", "backward", _backward_fake, _backward_reference)


def _save(ctx, inputs, output):
    images, index, weight, _, _, prefix, augmentation, patch_size = inputs
    ctx.save_for_backward(index, weight, augmentation)  # not the images: they may change in place before backward
    ctx.sizes = patch_size, 0 if prefix is None else prefix.shape[0], *images.shape[2:], images.dtype


def _differentiate(ctx, grad_tokens):
    return _backward(grad_tokens, *ctx.saved_tensors, *ctx.sizes), *[None] * 7


_forward.register_autograd(_differentiate, setup_context=_save)


def deciding_dtype(function: str, *args) -> torch.dtype:
    """That of the weight: float32 images may lie under 16-bit weights."""
    return args[2].dtype
