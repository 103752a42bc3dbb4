"""The layers of a frozen Vision Transformer by the dispatcher: each operation in the version that it takes for device, dtype and size.

The same layers as `cpp`. `out` is ignored: results come from the allocator, which under a CUDA graph gives the same memory at every replay.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import call, resolve

NAME = "dispatched"


class Linear:
    """x W^T + b and what may follow it, forward and backward to x. weight: [m, k]; bias, gamma: [m]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, gamma: Tensor | None = None):
        self.weight, self.bias, self.gamma = (None if x is None else x.detach().contiguous() for x in (weight, bias, gamma))
        self.scaled = self.weight if self.gamma is None else self.gamma[:, None] * self.weight  # gamma W: backward

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x W^T + b."""
        return F.linear(x, self.weight, self.bias)

    def forward_residual(self, x: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
        """residual + gamma (x W^T + b)."""
        return call("linear_residual", "forward", x, self.weight, self.bias, residual, self.gamma)

    def forward_activation(
        self, x: Tensor, activation: str, save: bool = True, saved: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """f(x W^T + b), and what is saved for `backward_activation`: its derivative, [..., m], or [0] if not `save`."""
        return call("linear_gelu", "forward", x, self.weight, self.bias, activation, save)

    def recompute_saved(self, x: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
        """What `forward_activation` saves."""
        return self.forward_activation(x, activation)[1]

    def backward(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Gradient of x from that of gamma (x W^T + b)."""
        return call("linear_residual", "backward", grad, self.scaled, None)

    def backward_activation(self, grad: Tensor, saved: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
        """Gradient of h where x = f(h); saved: f'(h)."""
        return call("linear_residual", "backward_gelu", grad, self.scaled, None, saved)


class Norm:
    """LayerNorm over rows [..., d]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float):
        self.weight, self.bias, self.eps = weight.detach(), None if bias is None else bias.detach(), eps

    def forward(self, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised x, and mean and 1 / standard deviation of its rows."""
        y, _, mean, rstd = call("layer_norm", "forward", x, self.weight, self.bias, self.eps, None)
        return y, mean, rstd

    def backward(self, grad: Tensor, add: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, out: Tensor | None = None) -> Tensor:
        """Gradient of x from that of the result, plus `add`."""
        return call("layer_norm", "backward", grad, add, x, self.weight, mean, rstd, self.eps)


class Attention:
    """Attention among all tokens of packed qkv [B, T, 3, H, D]."""

    saves_output = True  # whether backward reads the output

    @staticmethod
    def forward(qkv: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output [B, T, H * D] and log of the sum of exponentials [B, H, T]."""
        return call("attention", "forward", qkv, None, None, qkv.shape[-1] ** -0.5)

    @staticmethod
    def backward(grad: Tensor, qkv: Tensor, output: Tensor, lse: Tensor, out: Tensor | None = None) -> Tensor:
        """Gradient [B, T, 3, H, D] of qkv."""
        return call("attention", "backward", grad, qkv, None, None, output, lse, qkv.shape[-1] ** -0.5)


class ClsAttention:
    """Attention of a few queries q [B, P, H, D] among the keys and values kv [B, T, 2, H, D] of all tokens."""

    @staticmethod
    def forward(q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, P, H * D] and weights [B, H, P, T], float32."""
        out, _, weights = call("cls_attention", "forward", q, kv, q.shape[-1] ** -0.5)
        return out, weights

    @staticmethod
    def backward(grad: Tensor, q: Tensor, kv: Tensor, weights: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gradients of q and kv."""
        return call("cls_attention", "backward", grad, None, q, kv, weights, q.shape[-1] ** -0.5)


def take_tokens(x: Tensor, count: int) -> Tensor:
    """The first tokens [B, count, d] of x [B, T, d], contiguous."""
    return x[:, :count].contiguous()


def add_tokens(x: Tensor, few: Tensor) -> None:
    """Add few [B, count, d] to the first tokens of x [B, T, d], in place."""
    x[:, : few.shape[1]] += few


class Embed:
    """Tokens of the active patches of a rolled and flipped image, prefix tokens first. weight: [d, C * p * p]; position: [N, d]; prefix: [P, d]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, position: Tensor | None, prefix: Tensor, patch_size: int):
        self.weight, self.bias, self.position, self.prefix = (None if x is None else x.detach() for x in (weight, bias, position, prefix))
        self.patch_size = patch_size

    def forward(self, images: Tensor, index: Tensor, augmentation: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Tokens [B, P + n, d] of images [B, C, H, W]; augmentation: int [3] (dy, dx, flip)."""
        return call("patch_embed", "forward", images, index, self.weight, self.bias, self.position, self.prefix, augmentation, self.patch_size)

    def embed(self, pixels: Tensor, cells: Tensor, out: Tensor | None = None) -> Tensor:
        """Tokens of the pixels [B, n, C * p * p] that lie at grid cells [B, n]."""
        tokens = F.linear(pixels, self.weight, self.bias)
        if self.position is not None:
            tokens = tokens + self.position[cells.long()]
        return torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], dim=1)

    def backward(self, grad: Tensor, index: Tensor, augmentation: Tensor | None, out: Tensor) -> Tensor:
        """Gradient of the images, zero where no token reads, in the dtype and shape of out."""
        sizes = (self.patch_size, len(self.prefix), *out.shape[2:], out.dtype)
        return call("patch_embed", "backward", grad, index, self.weight, augmentation, *sizes)


def versions(weight: Tensor, batch: int, tokens: int, heads: int, width: int) -> dict[str, str]:
    """The version of every operation's forward in a block that would run for a weight [m, d] and these numbers of images, tokens, heads and width."""
    d = weight.shape[1]
    few, w = (torch.empty(*shape, dtype=weight.dtype, device=weight.device) for shape in ((1, tokens, d + 3 * heads * width), (d, d)))
    x, packed = few.expand(batch, -1, -1).split([d, 3 * heads * width], dim=-1)  # of the right shape, in the memory of one image
    qkv = packed.unflatten(-1, (3, heads, width))
    return {
        "attention": resolve("attention", "forward", qkv, None, None, 1.0),
        "cls_attention": resolve("cls_attention", "forward", qkv[:, :1, 0], qkv[:, :, 1:], 1.0),
        "layer_norm": resolve("layer_norm", "forward", x, w[0], w[0], 1e-6, None),
        "linear_gelu": resolve("linear_gelu", "forward", x, w, w[0], "gelu", True),
        "linear_residual": resolve("linear_residual", "forward", x, w, w[0], x, None),
    }
