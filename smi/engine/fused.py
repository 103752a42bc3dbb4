"""The fast engine: value and pixel gradient of a frozen ViT, forward and backward written out.

No weight gradients, no attention matrices; tokens are made for the active patches alone; of the last block, where only the tokens that the heads read
go on, queries, projection and MLP are computed for those alone, which is exact. What is kept for backward, per token and block, in elements:
3d (qkv) + 4d (the activation's argument) + 2d (what the two norms read); with `recompute` the 4d are computed again in the backward pass, a sixth
more products.

A model is cut in two. The trunk is every block whose output all tokens need, by the layers of `kernels.packed` or `kernels.frozen`. The tail is the
last block for a few tokens, the norm and the heads: small, left to autograd on PyTorch's own operations.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..kernels import frozen, packed
from ..kernels.dispatch import backend
from ..kernels.linear_gelu.reference import ACTIVATIONS
from ..models import Block, Norm, ViT
from .processor import faster_dtype
from .reference import Output

Memory = Callable[..., Tensor | None]  # name and shape to the memory of a result, or None where the layer makes its own


class Buffers:
    """Memory that stays from iteration to iteration, one tensor for each name."""

    def __init__(self):
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self.tensors or self.tensors[name].shape != shape:
            self.tensors[name] = torch.empty(shape, dtype=torch.float32, device="cpu")
        return self.tensors[name]


def fresh(name: str, *shape: int) -> None:
    """Every result in memory of its own."""


@dataclass(frozen=True)
class Mode:
    """How the fused engine computes: what decides its memory."""

    dtype: torch.dtype
    recompute: bool = False  # the activations' arguments again in the backward pass, instead of keeping them


@dataclass
class Saved:
    """What one forward pass leaves for its backward pass."""

    index: Tensor
    augmentation: Tensor | None
    like: Tensor  # the images, for shape and dtype alone
    memory: Memory
    pre: tuple | None = None  # of norm_pre: x, mean, rstd
    blocks: list[tuple] = field(default_factory=list)
    attended: Tensor | None = None  # qkv of the last block of the trunk, as attention read it
    last: tuple | None = None  # of the last block's first norm: x, mean, rstd
    leaves: list[Tensor] = field(default_factory=list)  # where the tail begins
    logits: Tensor | None = None  # with the tail's graph

    def bytes(self) -> int:
        """Bytes kept for the trunk's backward pass, images and index not counted."""
        groups = [*self.blocks, self.pre or (), self.last or ()]
        kept = {x.data_ptr(): x.numel() * x.element_size() for group in groups for x in group if isinstance(x, Tensor)}
        return sum(kept.values())


class Layers:
    """The layers of one block that all tokens pass."""

    def __init__(self, block: Block, family: ModuleType):
        self.norm1, self.norm2 = (family.Norm(n.weight, n.bias, n.eps) for n in (block.norm1, block.norm2))
        self.qkv = family.Linear(block.qkv.weight, block.qkv.bias)
        self.proj = family.Linear(block.proj.weight, block.proj.bias, block.scale1)
        self.fc1 = family.Linear(block.fc1.weight, block.fc1.bias)
        self.fc2 = family.Linear(block.fc2.weight, block.fc2.bias, block.scale2)
        self.q_norm, self.k_norm = (n and family.Norm(n.weight, n.bias, n.eps) for n in (block.q_norm, block.k_norm))


class Fused:
    """A ViT prepared for one dtype: weights laid out once."""

    def __init__(self, vit: ViT, dtype: torch.dtype | str = "auto", recompute: bool = False):
        dtype = choose_dtype(vit.device) if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            raise InputError(f"the fused engine computes in float32, bfloat16 or float16, not {name}: pass engine='reference'")
        self.mode = Mode(dtype, recompute)
        self.vit = vit = vit.to(vit.device, dtype)
        family = _family(vit)
        self.packed = family is packed
        self.few = len(vit.heads) if vit.pool == "token" else 0  # tokens that go on from the last block; 0: all
        self.embed = family.Embed(vit.embed.weight, vit.embed.bias, vit.position, vit.prefix, vit.patch_size)
        self.norm_pre = vit.norm_pre and family.Norm(vit.norm_pre.weight, vit.norm_pre.bias, vit.norm_pre.eps)
        self.blocks = [Layers(block, family) for block in vit.blocks[: len(vit.blocks) - bool(self.few)]]
        if self.few:
            last, width = vit.blocks[-1], vit.blocks[-1].qkv.weight.shape[0] // 3
            self.norm_last = family.Norm(last.norm1.weight, last.norm1.bias, last.norm1.eps)
            self.keys_values = family.Linear(last.qkv.weight[width:], None if last.qkv.bias is None else last.qkv.bias[width:])

    @property
    def dtype(self) -> torch.dtype:
        return self.mode.dtype

    @property
    def family(self) -> ModuleType:
        """The layers in use."""
        return packed if self.packed else frozen

    def describe(self) -> dict:
        """What runs: dtype, and the version of each operation."""
        if self.family is packed:
            versions = dict.fromkeys(("attention", "layer_norm", "linear_gelu", "linear_residual", "patch_embed"), packed.NAME)
        else:
            versions = frozen.versions(self.vit.blocks[0].qkv.weight, self.vit.num_patches, self.vit.num_heads)
        return {"dtype": str(self.dtype).removeprefix("torch."), "versions": versions}

    def forward(
        self, images: Tensor, index: Tensor, augmentation: Tensor | None = None, memory: Memory = fresh, keep: bool = True
    ) -> tuple[Output, Tensor, Saved]:
        """Logits and CLS row, the attention weights [B, H, Q, T] of the last block's CLS token, and what `backward` needs.

        images: float32 [B, C, H, W]; index: int [B, n]; augmentation: int [3] (dy, dx, flip). memory: where results go; those of a pass lie there
        until the next one. keep: whether `backward` will be called.
        """
        saved = Saved(index, augmentation, images, memory)
        with torch.no_grad():
            x = self.embed.forward(images, index, augmentation, memory("x", len(images), *self._tokens(index)))
            x = self._trunk(x, saved, keep)
        return self._tail(x, saved, keep)

    @torch.no_grad()
    def forward_patches(self, patches: Tensor, index: Tensor, memory: Memory = fresh) -> Tensor:
        """Logits [B, classes] of patches [B, n, C, p, p] that lie at grid cells index [B, n], each with its own position embedding."""
        patches = patches.to(self.dtype)
        x = self.embed.embed(patches.flatten(2), index, memory("x", len(patches), *self._tokens(index)))
        saved = Saved(index, None, patches, memory)
        return self._tail(self._trunk(x, saved, keep=False), saved, keep=False)[0].logits

    def _tokens(self, index: Tensor) -> tuple[int, int]:
        """Tokens of an image, and their width."""
        return self.vit.num_prefix + index.shape[1], self.vit.embed_dim

    def _trunk(self, x: Tensor, saved: Saved, keep: bool) -> Tensor:
        vit, memory = self.vit, saved.memory
        shape = batch, tokens, _ = x.shape
        width = vit.blocks[0].qkv.weight.shape[0] // 3
        hidden = vit.blocks[0].fc1.weight.shape[0]
        keep_h = keep and not self.mode.recompute
        if self.norm_pre:
            y, *statistics = self.norm_pre.forward(x, memory("x pre", *shape))
            saved.pre, x = (x, *statistics), y
        for i, block in enumerate(self.blocks):
            i = str(i) if keep else ""  # without backward every block may use the same memory
            y, *first = block.norm1.forward(x, memory("y", *shape))
            qkv = block.qkv.forward(y, memory("qkv" + i, batch, tokens, 3 * width)).unflatten(-1, (3, vit.num_heads, -1))
            attended, normed = self._normalise_heads(block, qkv)
            kept_out = "out" + i if self.family.Attention.keeps_output else "out"
            out, lse = self.family.Attention.forward(attended, memory(kept_out, batch, tokens, width))
            mid = block.proj.forward_residual(out, x, memory("mid" + i, *shape))
            y, *second = block.norm2.forward(mid, memory("y", *shape))
            h = memory("h" + i, batch, tokens, hidden) if keep_h else None
            a, h = block.fc1.forward_activation(y, vit.activation, keep_h, h, memory("a", batch, tokens, hidden))
            if keep:
                kept = out if self.family.Attention.keeps_output else None
                saved.blocks.append((x, *first, qkv, attended, normed, kept, lse, mid, *second, h if keep_h else None))
            x = block.fc2.forward_residual(a, mid, memory("x next" + i, *shape))
            saved.attended = attended
        return x

    def _normalise_heads(self, block: Layers, qkv: Tensor) -> tuple[Tensor, list[tuple]]:
        """qkv with queries and keys normalised where the block does that, and what their backward needs."""
        if block.q_norm is None and block.k_norm is None:
            return qkv, []
        parts, kept = list(qkv.unbind(2)), []
        for j, norm in enumerate((block.q_norm, block.k_norm)):
            if norm is not None:
                given = parts[j].contiguous()
                parts[j], *statistics = norm.forward(given)
                kept.append((j, norm, given, *statistics))
        return torch.stack(parts, dim=2), kept

    def _tail(self, x: Tensor, saved: Saved, keep: bool) -> tuple[Output, Tensor, Saved]:
        vit, memory = self.vit, saved.memory
        batch, tokens, d = x.shape
        if self.few:
            with torch.no_grad():
                y, *statistics = self.norm_last.forward(x, memory("y", batch, tokens, d))
                width = vit.blocks[-1].qkv.weight.shape[0] // 3
                pairs = self.keys_values.forward(y, memory("kv", batch, tokens, 2 * width)).unflatten(-1, (2, vit.num_heads, -1))
            saved.last = (x, *statistics)
            leaves = [x[:, : self.few], y[:, : self.few], pairs]
        else:
            leaves = [x]
        saved.leaves = [leaf.detach().requires_grad_(keep) for leaf in leaves]
        with torch.set_grad_enabled(keep):
            if self.few:
                read, weights = _last_block(vit, *saved.leaves)
            else:
                read = saved.leaves[0]
                weights = _weights(saved.attended[:, :1, 0], saved.attended[:, :, 1])
            saved.logits = _classify(vit, read)
        row = weights.detach()[:, :, 0].mean(1)[:, vit.num_prefix :]
        return Output(saved.logits.detach(), row), weights.detach(), saved

    def backward(self, saved: Saved, grad_logits: Tensor, out: Tensor | None = None) -> Tensor:
        """Gradient [B, C, H, W] of the images, float32, from that of the logits [B, classes]; in out where it is given."""
        grads = torch.autograd.grad(saved.logits, saved.leaves, grad_logits.to(saved.logits.dtype))
        saved.logits = None  # frees the tail's graph
        with torch.no_grad():
            grad = self._backward_to_tokens(saved, grads)
            if out is None:
                out = torch.empty_like(saved.like, memory_format=torch.contiguous_format)
            return self.embed.backward(grad, saved.index, saved.augmentation, out)

    def _backward_to_tokens(self, saved: Saved, grads: tuple[Tensor, ...]) -> Tensor:
        memory = saved.memory
        shape = saved.last[0].shape if self.few else grads[0].shape
        hidden = self.vit.blocks[0].fc1.weight.shape[0]
        if self.few:
            few_x, few_y, pairs = grads
            grad_y = self.keys_values.backward(pairs.flatten(2).contiguous(), memory("grad y", *shape))
            grad_y[:, : self.few] += few_y
            grad = self.norm_last.backward(grad_y, None, *saved.last, memory("grad", *shape))
            grad[:, : self.few] += few_x
        else:
            grad = grads[0].contiguous()
        for block, (x, mean1, rstd1, qkv, attended, normed, out, lse, mid, mean2, rstd2, h) in zip(
            reversed(self.blocks), reversed(saved.blocks), strict=True
        ):
            if h is None:
                y, *_ = block.norm2.forward(mid, memory("y", *shape))
                h = block.fc1.forward(y, memory("h", *shape[:2], hidden))
            grad_h = block.fc2.backward_activation(grad, h, self.vit.activation, memory("a", *shape[:2], hidden))
            grad_y = block.fc1.backward(grad_h, memory("grad y", *shape))
            grad = block.norm2.backward(grad_y, grad, mid, mean2, rstd2, memory("grad mid", *shape))
            grad_out = block.proj.backward(grad, memory("grad out", *shape[:2], qkv.shape[3] * qkv.shape[4]))
            grad_qkv = self.family.Attention.backward(grad_out, attended, out, lse, memory("grad qkv", *qkv.shape))
            for j, norm, given, *statistics in normed:
                grad_qkv[:, :, j] = norm.backward(grad_qkv[:, :, j].contiguous(), None, given, *statistics)
            grad_y = block.qkv.backward(grad_qkv.flatten(2), memory("grad y", *shape))
            grad = block.norm1.backward(grad_y, grad, x, mean1, rstd1, memory("grad", *shape))
        if self.norm_pre:
            grad = self.norm_pre.backward(grad, None, *saved.pre)
        return grad


def pass_bytes(vit: ViT, batch: int, active: int, mode: Mode) -> int:
    """Bytes of a forward and backward pass on `batch` images with `active` patches: what is kept, and the results that pass through."""
    block, d, tokens = vit.blocks[0], vit.embed_dim, vit.num_prefix + active
    width, hidden = block.qkv.weight.shape[0] // 3, block.fc1.weight.shape[0]
    per_token = 3 * width + (0 if mode.recompute else hidden) + 2 * d
    kept = len(vit.blocks) * (per_token + width)  # the last: attention's output, which only some versions read again
    passing = 2 * hidden + 6 * width + 6 * d
    pixels = 2 * active * vit.embed.weight.shape[1]
    return batch * (tokens * (kept + passing) + pixels) * mode.dtype.itemsize


def _family(vit: ViT) -> ModuleType:
    """The layers for this device and dtype: C++ on the CPU where it can be had and nothing else is asked for."""
    if vit.device.type == "cpu" and backend() == "auto" and packed.unsupported(vit.embed.weight) is None:
        return packed
    return frozen


def _last_block(vit: ViT, x: Tensor, y: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The last block for Q tokens x [B, Q, d], normalised y, among keys and values [B, T, 2, H, D]: their outputs, and weights [B, H, Q, T]."""
    block, width = vit.blocks[-1], pairs.shape[3] * pairs.shape[4]
    q = F.linear(y, block.qkv.weight[:width], None if block.qkv.bias is None else block.qkv.bias[:width]).unflatten(-1, (vit.num_heads, -1))
    k, v = pairs.unbind(2)
    weights = _weights(_normalise(q, block.q_norm), _normalise(k, block.k_norm))
    out = (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
    x = x + _scaled(F.linear(out, block.proj.weight, block.proj.bias), block.scale1)
    h = F.linear(_normalise(x, block.norm2), block.fc1.weight, block.fc1.bias)
    return x + _scaled(F.linear(ACTIVATIONS[vit.activation](h), block.fc2.weight, block.fc2.bias), block.scale2), weights


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Softmax of scaled scores [B, H, Q, T], float32, of q [B, Q, H, D] and k [B, T, H, D]."""
    return (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).float().mul(q.shape[-1] ** -0.5).softmax(-1)


def _classify(vit: ViT, x: Tensor) -> Tensor:
    """Logits [B, classes] from the last tokens: all, or those that the heads read."""
    x = _normalise(x, vit.norm)
    pooled = [x[:, vit.num_prefix :].mean(1)] if vit.pool == "avg" else [x[:, i] for i in range(len(vit.heads))]
    logits = [F.linear(_normalise(token, vit.fc_norm), head.weight, head.bias) for token, head in zip(pooled, vit.heads, strict=True)]
    return torch.stack(logits).float().mean(0)


def _normalise(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it; on the CPU whichever product is faster, measured once a process."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return faster_dtype()
