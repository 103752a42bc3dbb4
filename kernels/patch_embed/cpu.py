"""patch_embed on the CPU: pixels taken and given back in C++ (csrc/cpu/pixels.cpp), tokens float32 or bfloat16; the GEMM is PyTorch's."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from smi.csrc import host

from ..cpp_calls import DTYPES, address, in_range, unless_taken


class Patches(ctypes.Structure):
    """As in csrc/cpu/pixels.cpp."""

    _fields_ = [
        ("index", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "n", "channels", "height", "width", "patch", "dy", "dx", "flip")),
    ]


unavailable, is_built, ensure_built = host.CPU.why_not, host.CPU.is_built, host.CPU.ensure_built


def unsupported(function: str, *args) -> str | None:
    images = args[-1] if function == "backward" else args[0].dtype
    return "it takes images in float32 alone" if images != torch.float32 else unless_taken(*args)


def described(index: Tensor, augmentation: Tensor | None, patch_size: int, channels: int, height: int, width: int) -> tuple[Patches, Tensor]:
    """The patches as the C++ takes them, and the int64 index, which must live as long. Raises IndexError where a cell is not on the grid."""
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"images of {height} x {width} do not divide into patches of {patch_size}")
    in_range("index", index, 0, (height // patch_size) * (width // patch_size))
    index = index.long().contiguous()
    moves = (0, 0, 0) if augmentation is None else augmentation.tolist()
    return Patches(address(index, *index.shape, dtype=torch.int64), *index.shape, channels, height, width, patch_size, *moves), index


def take_pixels(images: Tensor, index: Tensor, augmentation: Tensor | None, patch_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pixels [B, n, C * p * p] in dtype under the cells int64 [B, n] to which the patches move, and those cells."""
    patches, index = described(index, augmentation, patch_size, *images.shape[1:])
    images, cells = images.contiguous(), torch.empty_like(index)
    shape = *index.shape, images.shape[1] * patch_size**2
    pixels = images.new_empty(shape, dtype=dtype)
    at = address(images, len(index), *images.shape[1:]), address(pixels, *shape, dtype=dtype), address(cells, *index.shape, dtype=torch.int64)
    getattr(host.library(), f"smi_take_pixels_{DTYPES[dtype]}")(ctypes.byref(patches), *map(ctypes.c_void_p, at))
    return pixels, cells


def give_pixels(pixels: Tensor, index: Tensor, augmentation: Tensor | None, patch_size: int, out: Tensor) -> Tensor:
    """The adjoint: out [B, C, H, W] gets the pixels [B, n, C * p * p] where they came from, zero elsewhere."""
    patches, index = described(index, augmentation, patch_size, *out.shape[1:])
    pixels = pixels.contiguous()  # named, so that it lives as long as the call
    at = address(pixels, *index.shape, out.shape[1] * patch_size**2, dtype=pixels.dtype), address(out, len(index), *out.shape[1:])
    getattr(host.library(), f"smi_give_pixels_{DTYPES[pixels.dtype]}")(ctypes.byref(patches), *map(ctypes.c_void_p, at))
    return out


def add_position(tokens: Tensor, position: Tensor | None, cells: Tensor, prefix: Tensor | None) -> None:
    """Put the prefix tokens [P, d] before the patches of each image of tokens [B, P + n, d], in place, and add position [N, d] at cells [B, n]."""
    count, d, dtype = 0 if prefix is None else len(prefix), tokens.shape[-1], tokens.dtype
    if position is not None:
        in_range("cells", cells, 0, len(position))
    at = (
        address(tokens, len(cells), count + cells.shape[1], d, dtype=dtype),
        address(position, *(() if position is None else (len(position), d)), dtype=dtype),
        address(cells, *cells.shape, dtype=torch.int64),
        address(prefix, count, d, dtype=dtype),
    )
    add = getattr(host.library(), f"smi_add_position_{DTYPES[dtype]}")
    add(*map(ctypes.c_void_p, at), *map(ctypes.c_int64, (*cells.shape, count, d)))


def forward(
    images: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    augmentation: Tensor | None,
    patch_size: int,
) -> Tensor:
    """Tokens [B, P + n, d] as in op.py."""
    pixels, cells = take_pixels(images, index, augmentation, patch_size, weight.dtype)
    count = 0 if prefix is None else len(prefix)
    tokens = weight.new_empty(len(images), count + index.shape[1], len(weight))
    tokens[:, count:] = F.linear(pixels, weight, bias)
    add_position(tokens, None if position is None else position.contiguous(), cells, None if prefix is None else prefix.contiguous())
    return tokens


def backward(
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
    """Gradient [B, C, H, W] of the images."""
    images = grad_tokens.new_empty(len(grad_tokens), weight.shape[1] // patch_size**2, height, width, dtype=dtype)
    return give_pixels(grad_tokens[:, prefix:] @ weight, index, augmentation, patch_size, images)
