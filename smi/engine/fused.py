"""The fast engine: value and pixel gradient of a frozen ViT, forward and backward written out.

No weight gradients, no attention matrices; tokens are made for the active patches alone; of the last block, where only the tokens that the heads read
go on, queries, projection and MLP are computed for those alone, which is exact. What is kept for backward, per token and block, in elements:
3d (qkv) + 4d (the activation's argument, or its derivative there) + 2d (what the two norms read); with `recompute` the 4d are computed again in the
backward pass, a sixth more products.

A model is cut in two. The trunk is all blocks, by the layers of `kernels.packed` or `kernels.frozen`; those of the former are recorded and made image
by image (`kernels.recording`), once for memory that stays, as a CUDA graph is on a GPU (`graph`). The tail is the norm and the heads: small, left to
autograd on PyTorch's own operations.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..kernels.dispatch import backend
from ..kernels.layers import cpp, dispatched
from ..kernels.layers.recorded_pass import Recording, recorded
from ..models.vit import Block, Norm, ViT
from .processor import faster_dtype
from .reference import Output


class Memory:
    """Where results go: each into memory of its own."""

    def __init__(self):
        self.passes: dict[object, Pass] = {}  # recorded in it

    def __call__(self, name: str, *shape: int) -> Tensor | None:
        """Memory for the result of that name, or None where the layer makes its own."""
        return None


class Buffers(Memory):
    """Memory that stays from iteration to iteration, one tensor for each name."""

    def __init__(self):
        super().__init__()
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self.tensors or self.tensors[name].shape != shape:
            self.tensors[name] = torch.empty(shape, dtype=torch.float32, device="cpu")
        return self.tensors[name]


class Pass(NamedTuple):
    """Layers recorded for what lies in x: running the recording fills the result."""

    x: Tensor
    result: object
    recording: Recording


@dataclass(frozen=True)
class Mode:
    """How the fused engine computes: what decides its memory."""

    dtype: torch.dtype
    recompute: bool = False  # what the activations leave again in the backward pass, instead of keeping them


class BlockSaved(NamedTuple):
    """What one block leaves for its backward pass: 3d + 4d + 2d elements per token, and a few numbers per row."""

    x: Tensor
    norm1: list[Tensor]  # mean and 1 / standard deviation
    attended: Tensor  # packed qkv [B, T, 3, H, D], as attention read it
    heads: list[tuple]  # of the norms of queries and keys
    out: Tensor | None  # attention's output, for a version whose backward reads it
    lse: Tensor
    mid: Tensor
    norm2: list[Tensor]
    bend: Tensor | None  # of the activation: its argument or derivative, as the layers have it; None where it is computed again


class LastSaved(NamedTuple):
    """The same for the last block, of which only a few tokens go on."""

    x: Tensor
    norm1: list[Tensor]
    q: Tensor  # [B, few, H, D], as attention read it
    kv: Tensor  # [B, T, 2, H, D], likewise
    heads: tuple[list[tuple], list[tuple]]  # of q, of kv
    weights: Tensor
    mid: Tensor
    norm2: list[Tensor]
    bend: Tensor


@dataclass
class Trunk:
    """What a pass through the blocks leaves."""

    pre: tuple | None = None  # of norm_pre: x, mean, rstd
    blocks: list[BlockSaved] = field(default_factory=list)
    last: LastSaved | None = None
    read: Tensor | None = None  # the tokens that the heads read
    weights: Tensor | None = None  # of the last block's attention, [B, H, Q, T]
    passes: dict[object, Pass] = field(default_factory=dict)  # the backward pass, once recorded


@dataclass
class Saved:
    """What one forward pass leaves for its backward pass."""

    index: Tensor
    augmentation: Tensor | None
    like: Tensor  # the images, for shape and dtype alone
    memory: Memory
    trunk: Trunk
    leaf: Tensor  # the trunk's result, where the tail begins
    logits: Tensor | None = None  # with the tail's graph

    def bytes(self) -> int:
        """Bytes kept for the trunk's backward pass, images and index not counted."""
        kept = {x.data_ptr(): x.numel() * x.element_size() for x in _tensors([self.trunk.blocks, self.trunk.pre, self.trunk.last])}
        return sum(kept.values())


class Layers:
    """The layers of one block. few: whether only a few tokens' queries are asked for, so that they are computed apart from keys and values."""

    def __init__(self, block: Block, family: ModuleType, few: bool = False):
        self.norm1, self.norm2 = (family.Norm(n.weight, n.bias, n.eps) for n in (block.norm1, block.norm2))
        weight, bias, width = block.qkv.weight, block.qkv.bias, block.qkv.weight.shape[0] // 3
        if few:
            self.query = family.Linear(weight[:width], None if bias is None else bias[:width])
            self.keys_values = family.Linear(weight[width:], None if bias is None else bias[width:])
        else:
            self.qkv = family.Linear(weight, bias)
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
        self.packed = family is cpp
        self.recordable = self.packed and not any(block.q_norm or block.k_norm for block in vit.blocks)  # those norms take operations of PyTorch
        self.few = len(vit.heads) if vit.pool == "token" else 0  # tokens that go on from the last block; 0: all
        self.embed = family.Embed(vit.embed.weight, vit.embed.bias, vit.position, vit.prefix, vit.patch_size)
        self.norm_pre = vit.norm_pre and family.Norm(vit.norm_pre.weight, vit.norm_pre.bias, vit.norm_pre.eps)
        self.blocks = [Layers(block, family) for block in vit.blocks[: len(vit.blocks) - bool(self.few)]]
        self.last = Layers(vit.blocks[-1], family, few=True) if self.few else None

    @property
    def dtype(self) -> torch.dtype:
        return self.mode.dtype

    @property
    def family(self) -> ModuleType:
        """The layers in use."""
        return cpp if self.packed else dispatched

    def describe(self) -> dict:
        """What runs: dtype, and the version of each operation."""
        if self.family is cpp:
            versions = dict.fromkeys(("attention", "cls_attention", "layer_norm", "linear_gelu", "linear_residual", "patch_embed"), cpp.NAME)
        else:
            versions = dispatched.versions(self.vit.blocks[0].qkv.weight, self.vit.num_patches, self.vit.num_heads)
        return {"dtype": str(self.dtype).removeprefix("torch."), "versions": versions}

    def memory(self) -> Memory:
        """For the results of one pass at a time."""
        return Buffers() if self.packed else Memory()

    def forward(
        self, images: Tensor, index: Tensor, augmentation: Tensor | None = None, memory: Memory | None = None, keep: bool = True
    ) -> tuple[Output, Tensor, Saved]:
        """Logits and CLS row, the attention weights [B, H, Q, T] of the last block's CLS token, and what `backward` needs.

        images: float32 [B, C, H, W]; index: int [B, n]; augmentation: int [3] (dy, dx, flip). memory: where results go, of this pass alone when
        None; those of a pass lie there until the next one. keep: whether `backward` will be called.
        """
        memory = memory or self.memory()
        with torch.no_grad():
            x = self.embed.forward(images, index, augmentation, memory("x", len(images), *self._tokens(index)))
            trunk = self._forward_trunk(x, memory, keep)
        saved = Saved(index, augmentation, images, memory, trunk, trunk.read.detach().requires_grad_(keep))
        with torch.set_grad_enabled(keep):
            saved.logits = _classify(self.vit, saved.leaf)
        weights = trunk.weights
        return Output(saved.logits.detach(), weights[:, :, 0].mean(1)[:, self.vit.num_prefix :]), weights, saved

    @torch.no_grad()
    def forward_patches(self, patches: Tensor, index: Tensor, memory: Memory | None = None) -> Tensor:
        """Logits [B, classes] of patches [B, n, C, p, p] that lie at grid cells index [B, n], each with its own position embedding."""
        patches, memory = patches.to(self.dtype), memory or self.memory()
        x = self.embed.embed(patches.flatten(2), index, memory("x", len(patches), *self._tokens(index)))
        return _classify(self.vit, self._forward_trunk(x, memory, keep=False).read)

    def _forward_trunk(self, x: Tensor, memory: Memory, keep: bool) -> Trunk:
        trunk = self._run(memory.passes, (self, keep), x, x.shape[1], lambda: self._blocks(x, memory, keep))
        if not self.few:
            qkv = trunk.blocks[-1].attended
            trunk.weights = _weights(qkv[:, :1, 0], qkv[:, :, 1])
        return trunk

    def _run(self, passes: dict[object, Pass], key: object, x: Tensor, tokens: int, layers: Callable[[], object]):
        """What layers on x, [B, ...], result in. In C++ their calls are recorded, once for the same memory, and made image by image."""
        if not self.recordable:
            return layers()
        if key not in passes or passes[key].x is not x:
            passes.pop(key, None)
            passes[key] = Pass(x, *recorded(layers, len(x), tokens))
        passes[key].recording.run()
        return passes[key].result

    def _tokens(self, index: Tensor) -> tuple[int, int]:
        """Tokens of an image, and their width."""
        return self.vit.num_prefix + index.shape[1], self.vit.embed_dim

    def _blocks(self, x: Tensor, memory: Memory, keep: bool) -> Trunk:
        vit, trunk = self.vit, Trunk()
        shape = batch, tokens, _ = x.shape
        width, hidden = vit.blocks[0].proj.weight.shape[1], vit.blocks[0].fc1.weight.shape[0]
        keep_bend, keeps_output = keep and not self.mode.recompute, self.family.Attention.keeps_output
        if self.norm_pre:
            y, *statistics = self.norm_pre.forward(x, memory("x pre", *shape))
            trunk.pre, x = (x, *statistics), y
        for i, block in enumerate(self.blocks):
            i = str(i) if keep else ""  # without backward every block may use the same memory
            y, *norm1 = block.norm1.forward(x, memory("y", *shape))
            qkv = block.qkv.forward(y, memory("qkv" + i, batch, tokens, 3 * width)).unflatten(-1, (3, vit.num_heads, -1))
            attended, heads = _normalise_heads(qkv, block.q_norm, block.k_norm)
            out, lse = self.family.Attention.forward(attended, memory("out" + i if keeps_output else "out", batch, tokens, width))
            mid = block.proj.forward_residual(out, x, memory("mid" + i, *shape))
            y, *norm2 = block.norm2.forward(mid, memory("y", *shape))
            bend = memory("bend" + i, batch, tokens, hidden) if keep_bend else None
            a, bend = block.fc1.forward_activation(y, vit.activation, keep_bend, bend, memory("a", batch, tokens, hidden))
            bend = bend if keep_bend else None
            if keep or block is self.blocks[-1]:
                saved = BlockSaved(x, norm1, attended, heads, out if keeps_output else None, lse, mid, norm2, bend)
                trunk.blocks.append(saved)
            x = block.fc2.forward_residual(a, mid, memory("x next" + i, *shape))
        trunk.read = x
        if self.few:
            self._last_block(x, trunk, memory)
        return trunk

    def _last_block(self, x: Tensor, trunk: Trunk, memory: Memory) -> None:
        """The last block for the few tokens that go on."""
        vit, block, (batch, tokens, _) = self.vit, self.last, x.shape
        width = vit.blocks[-1].proj.weight.shape[1]
        y, *norm1 = block.norm1.forward(x, memory("y", *x.shape))
        kv = block.keys_values.forward(y, memory("kv", batch, tokens, 2 * width)).unflatten(-1, (2, vit.num_heads, -1))
        few_x, few_y = (self.family.take_tokens(each, self.few) for each in (x, y))
        q, q_heads = _normalise_heads(block.query.forward(few_y).unflatten(-1, (1, vit.num_heads, -1)), block.q_norm)
        kv, k_heads = _normalise_heads(kv, block.k_norm)
        out, trunk.weights = self.family.ClsAttention.forward(q[:, :, 0], kv)
        mid = block.proj.forward_residual(out, few_x)
        y, *norm2 = block.norm2.forward(mid)
        a, bend = block.fc1.forward_activation(y, vit.activation)
        trunk.read = block.fc2.forward_residual(a, mid)
        trunk.last = LastSaved(x, norm1, q[:, :, 0], kv, (q_heads, k_heads), trunk.weights, mid, norm2, bend)

    def backward(self, saved: Saved, grad_logits: Tensor, out: Tensor | None = None) -> Tensor:
        """Gradient [B, C, H, W] of the images, float32, from that of the logits [B, classes]; in out where it is given."""
        (found,) = torch.autograd.grad(saved.logits, saved.leaf, grad_logits.to(saved.logits.dtype))
        saved.logits = None  # frees the tail's graph
        memory, trunk = saved.memory, saved.trunk
        with torch.no_grad():
            grad = memory("grad read", *found.shape)
            grad = found.contiguous() if grad is None else grad.copy_(found)
            tokens = self._tokens(saved.index)[0]
            grad = self._run(trunk.passes, "backward", grad, tokens, lambda: self._backward_trunk(trunk, grad, memory))
            if out is None:
                out = torch.empty_like(saved.like, memory_format=torch.contiguous_format)
            return self.embed.backward(grad, saved.index, saved.augmentation, out)

    def _backward_trunk(self, trunk: Trunk, grad: Tensor, memory: Memory) -> Tensor:
        activation, hidden = self.vit.activation, self.vit.blocks[0].fc1.weight.shape[0]
        if self.few:
            grad = self._backward_last_block(trunk.last, grad, memory)
        shape = grad.shape
        for block, kept in zip(reversed(self.blocks), reversed(trunk.blocks), strict=True):
            bend = kept.bend
            if bend is None:
                y, *_ = block.norm2.forward(kept.mid, memory("y", *shape))
                bend = block.fc1.again(y, activation, memory("bend", *shape[:2], hidden))
            grad_h = block.fc2.backward_activation(grad, bend, activation, memory("a", *shape[:2], hidden))
            grad_y = block.fc1.backward(grad_h, memory("grad y", *shape))
            grad = block.norm2.backward(grad_y, grad, kept.mid, *kept.norm2, memory("grad mid", *shape))
            grad_out = block.proj.backward(grad, memory("grad out", *shape[:2], kept.attended.shape[3] * kept.attended.shape[4]))
            grad_qkv = self.family.Attention.backward(grad_out, kept.attended, kept.out, kept.lse, memory("grad qkv", *kept.attended.shape))
            _backward_heads(grad_qkv, kept.heads)
            grad_y = block.qkv.backward(grad_qkv.flatten(2), memory("grad y", *shape))
            grad = block.norm1.backward(grad_y, grad, kept.x, *kept.norm1, memory("grad", *shape))
        if trunk.pre:
            grad = self.norm_pre.backward(grad, None, *trunk.pre)
        return grad

    def _backward_last_block(self, kept: LastSaved, grad: Tensor, memory: Memory) -> Tensor:
        """Gradient of all tokens [B, T, d] from that of the few."""
        block, shape = self.last, kept.x.shape
        grad_h = block.fc2.backward_activation(grad, kept.bend, self.vit.activation)
        grad_few = block.norm2.backward(block.fc1.backward(grad_h), grad, kept.mid, *kept.norm2)
        grad_out = block.proj.backward(grad_few)
        grad_q, grad_kv = self.family.ClsAttention.backward(grad_out, kept.q, kept.kv, kept.weights, memory("grad kv", *kept.kv.shape))
        _backward_heads(grad_q.unsqueeze(2), kept.heads[0])
        _backward_heads(grad_kv, kept.heads[1])
        grad_y = block.keys_values.backward(grad_kv.flatten(2), memory("grad y", *shape))
        self.family.add_tokens(grad_y, block.query.backward(grad_q.flatten(2)))
        grad = block.norm1.backward(grad_y, None, kept.x, *kept.norm1, memory("grad", *shape))
        self.family.add_tokens(grad, grad_few)
        return grad


def _normalise_heads(packed: Tensor, *norms) -> tuple[Tensor, list[tuple]]:
    """packed [B, T, J, H, D], of which the first parts along J pass a norm where there is one, and what the norms' backward needs."""
    if not any(norms):
        return packed, []
    parts, kept = list(packed.unbind(2)), []
    for j, norm in enumerate(norms):
        if norm is not None:
            given = parts[j].contiguous()
            parts[j], *statistics = norm.forward(given)
            kept.append((j, norm, given, *statistics))
    return torch.stack(parts, dim=2), kept


def _backward_heads(grad: Tensor, kept: list[tuple]) -> None:
    """The gradient of `_normalise_heads`, in place."""
    for j, norm, given, *statistics in kept:
        grad[:, :, j] = norm.backward(grad[:, :, j].contiguous(), None, given, *statistics)


def _tensors(kept: object) -> Iterator[Tensor]:
    """Those within lists and tuples of lists and tuples."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, list | tuple):
        for part in kept:
            yield from _tensors(part)


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
    if vit.device.type == "cpu" and backend() == "auto" and cpp.unsupported(vit.embed.weight) is None:
        return cpp
    return dispatched


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


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it; on the CPU whichever product is faster, measured once a process."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return faster_dtype()
