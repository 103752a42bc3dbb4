"""The layers of a frozen Vision Transformer in C++ (csrc/cpu), on the CPU in float32, and in bfloat16 where the processor multiplies it.

Weights are packed once for each direction, in the order in which the GEMM reads them. Bias, residual, layer scale, activation and its derivative are
applied while the result is in the cache. Results go to `out`, memory of the caller's, where it is given. `dispatched` has the same layers for every
other device and dtype.
"""

import ctypes

import torch
from torch import Tensor

from smi.csrc import host

from ..attention import cpu as attention
from ..cls_attention import cpu as cls_attention
from ..cpp_calls import DTYPES, address, call, checked
from ..layer_norm import cpu as layer_norm
from ..patch_embed import cpu as patch_embed

NAME = "cpu"  # the version that runs, as the dispatcher names it

EPILOGUES = ("none", "residual", "activation", "derivative", "times")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


class Params(ctypes.Structure):
    """As in csrc/cpu/linear.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "packed", "bias", "residual", "gamma", "slope", "y")),
        *((name, ctypes.c_int64) for name in ("m", "k", "n", "ldx")),
        *((name, ctypes.c_int32) for name in ("epilogue", "activation")),
    ]


PRODUCTS = ("nothing", "pairs of bfloat16s (AVX-512 BF16)", "tiles of bfloat16s (AMX)")  # what may multiply them, as the C++ numbers it


def unsupported(*weights: Tensor) -> str | None:
    """Why weights cannot be packed, as far as is known without compiling (`ensure_built`); None if nothing is known against it."""
    for weight in weights:
        if weight.device.type != "cpu" or weight.dtype not in DTYPES:
            return f"it takes float32 or bfloat16 on the CPU, not {weight.dtype} on {weight.device}"
        if weight.dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
            return "this processor does not multiply bfloat16"
        if weight.dtype == torch.bfloat16 and any(side % 2 for side in weight.shape):
            return f"it multiplies bfloat16 in pairs, and {' x '.join(map(str, weight.shape))} is not even"
    return host.CPU.why_not()


def ensure_built(dtype: torch.dtype = torch.float32) -> str | None:
    """Compile what is missing; why there are no layers in that dtype, in one sentence, None if there are."""
    reason = host.CPU.ensure_built()
    if reason is None and dtype == torch.bfloat16 and host.library().smi_bfloat16_products() == 0:
        return "the compiler does not know this processor's bfloat16"
    return reason


class PackedMatrix:
    """A matrix B [k, n], its rows times scale [k] float32 where that is given, in the order in which the C++ reads it."""

    def __init__(self, matrix: Tensor, scale: Tensor | None = None):
        self.k, self.n = matrix.shape
        if reason := unsupported(matrix):
            raise ValueError(reason)
        library = host.library()
        library.smi_packed_numbers.restype = ctypes.c_int64
        self.memory = matrix.new_empty(library.smi_packed_numbers(ctypes.c_int64(self.k), ctypes.c_int64(self.n)))
        strides = (ctypes.c_int64(stride) for stride in matrix.stride())
        sizes = (ctypes.c_int64(self.k), ctypes.c_int64(self.n))
        at = map(ctypes.c_void_p, (checked(matrix).data_ptr(), address(scale, self.k), self.memory.data_ptr()))
        getattr(library, f"smi_pack_{DTYPES[matrix.dtype]}")(next(at), *strides, next(at), *sizes, next(at))

    def multiply(
        self, x: Tensor, out: Tensor | None, epilogue: str = "none", bias=None, residual=None, gamma=None, derivative=None, activation: str = "gelu"
    ) -> Tensor:
        """epilogue(x B): x [..., k]; out [..., n], made where it is None; all contiguous."""
        if out is None:
            out = x.new_empty(*x.shape[:-1], self.n)
        rows, columns = x.shape[:-1], (*x.shape[:-1], self.n)
        m = rows.numel()
        dtype = self.memory.dtype
        pointers = (
            address(x, *rows, self.k, dtype=dtype),
            address(self.memory, *self.memory.shape, dtype=dtype),
            address(bias, self.n),
            address(residual, *columns, dtype=dtype),
            address(gamma, self.n),
            address(derivative, *columns, dtype=dtype),
            address(out, *columns, dtype=dtype),
        )
        tensors = (x, self.memory, bias, residual, gamma, derivative, out)
        params = Params(*pointers, m, self.k, self.n, self.k, EPILOGUES.index(epilogue), ACTIVATIONS.index(activation))
        call(f"smi_linear_{DTYPES[x.dtype]}", params, *tensors, cost=2.0 * m * self.k * self.n)
        return out


class Linear:
    """x W^T + b and what may follow it, forward and backward to x. weight: [m, k]; bias, gamma: [m]. Every x and gradient must be contiguous."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, gamma: Tensor | None = None):
        self.bias, self.gamma = (None if x is None else x.detach().float().contiguous() for x in (bias, gamma))
        self.transposed = PackedMatrix(weight.detach().T)  # W^T: forward
        self.scaled = PackedMatrix(weight.detach(), self.gamma)  # gamma W: backward

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x W^T + b."""
        return self.transposed.multiply(x, out, bias=self.bias)

    def forward_residual(self, x: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
        """residual + gamma (x W^T + b)."""
        return self.transposed.multiply(x, out, "residual", self.bias, residual, self.gamma)

    def forward_activation(
        self, x: Tensor, activation: str, save: bool = True, saved: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """f(x W^T + b), and what is saved for `backward_activation`: its derivative, [..., m], in `saved` where that is given."""
        if save and saved is None:
            saved = x.new_empty(*x.shape[:-1], self.transposed.n)
        saved = saved if save else None
        return self.transposed.multiply(x, out, "activation", self.bias, derivative=saved, activation=activation), saved

    def recompute_saved(self, x: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
        """What `forward_activation` saves, without its result."""
        return self.transposed.multiply(x, out, "derivative", self.bias, activation=activation)

    def backward(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Gradient of x from that of gamma (x W^T + b)."""
        return self.scaled.multiply(grad, out)

    def backward_activation(self, grad: Tensor, saved: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
        """Gradient of h where x = f(h); saved: f'(h)."""
        return self.scaled.multiply(grad, out, "times", derivative=saved)


class Norm:
    """LayerNorm over rows [..., d]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float):
        self.weight, self.bias, self.eps = weight.detach().float(), None if bias is None else bias.detach().float(), eps

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised x, and mean and 1 / standard deviation of its rows."""
        y, _, mean, rstd = layer_norm.forward(x, self.weight, self.bias, self.eps, None, out)
        return y, mean, rstd

    def backward(self, grad: Tensor, add: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, out: Tensor | None = None) -> Tensor:
        """Gradient of x from that of the result, plus `add`; out may be add."""
        return layer_norm.backward(grad, add, x, self.weight, mean, rstd, self.eps, out)


class Attention:
    """Attention among all tokens of packed qkv [B, T, 3, H, D]; backward does not need the output."""

    saves_output = False  # whether backward reads the output

    @staticmethod
    def forward(qkv: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output [B, T, H * D] and log of the sum of exponentials [B, H, T]."""
        return attention.forward(qkv, None, None, qkv.shape[-1] ** -0.5, out)

    @staticmethod
    def backward(grad: Tensor, qkv: Tensor, output: Tensor | None, lse: Tensor, out: Tensor | None = None) -> Tensor:
        """Gradient [B, T, 3, H, D] of qkv."""
        return attention.backward(grad, qkv, None, None, output, lse, qkv.shape[-1] ** -0.5, out)


class ClsAttention:
    """Attention of a few queries q [B, P, H, D] among the keys and values kv [B, T, 2, H, D] of all tokens."""

    @staticmethod
    def forward(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, P, H * D] and weights [B, H, P, T]."""
        out, _, weights = cls_attention.forward(q, kv, q.shape[-1] ** -0.5)
        return out, weights

    @staticmethod
    def backward(grad: Tensor, q: Tensor, kv: Tensor, weights: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gradients of q and kv, the second in `out` where that is given."""
        return cls_attention.backward(grad, None, q, kv, weights, q.shape[-1] ** -0.5, out)


take_tokens, add_tokens = cls_attention.take_tokens, cls_attention.add_tokens


class Embed:
    """Tokens of the active patches of a rolled and flipped image, prefix tokens first. weight: [d, C * p * p]; position: [N, d]; prefix: [P, d]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, position: Tensor | None, prefix: Tensor, patch_size: int):
        self.linear, self.patch_size = Linear(weight, bias), patch_size
        self.position, self.prefix = (None if x is None else x.detach().contiguous() for x in (position, prefix))

    def forward(self, images: Tensor, index: Tensor, augmentation: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Tokens [B, P + n, d] of images float32 [B, C, H, W]; augmentation: int [3] (dy, dx, flip)."""
        return self.embed(*patch_embed.take_pixels(images, index, augmentation, self.patch_size, self.prefix.dtype), out)

    def embed(self, pixels: Tensor, cells: Tensor, out: Tensor | None = None) -> Tensor:
        """Tokens of the pixels [B, n, C * p * p] that lie at grid cells [B, n]."""
        count = len(self.prefix)
        if out is None:
            out = pixels.new_empty(len(pixels), count + cells.shape[1], self.linear.transposed.n)
        out[:, count:] = self.linear.forward(pixels.contiguous())
        patch_embed.add_position(out, self.position, cells.long().contiguous(), self.prefix)
        return out

    def backward(self, grad: Tensor, index: Tensor, augmentation: Tensor | None, out: Tensor) -> Tensor:
        """Gradient of the images, written to out [B, C, H, W], zero where no token reads."""
        pixels = self.linear.backward(grad[:, len(self.prefix) :].contiguous())
        return patch_embed.give_pixels(pixels, index, augmentation, self.patch_size, out)
