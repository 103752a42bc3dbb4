"""The fused engine: value and pixel gradient of a frozen ViT, forward and backward written out.

No weight gradients and no attention matrices; tokens are made for the active patches alone. Of the last block, queries, projection and MLP are
computed for the tokens that the heads read, which is exact. Saved activations, in elements per token and block: 3d (qkv) + 4d (the activation's
derivative) + 2d (inputs of the two norms). `recompute` saves 44 % of them, the 4d, for 17 % more FLOPs.

A model is cut in two. The trunk is all blocks, by the layers of `kernels.layers.cpp` or `kernels.layers.dispatched`. The calls of the former are
recorded once for memory that stays; then each thread runs the whole recorded sequence on its share of the batch (`kernels.layers.recorded_pass`),
as a CUDA graph is replayed on a GPU. The tail is the last norm and the heads: small, left to autograd.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.layers import cpp, dispatched
from ..kernels.layers.recorded_pass import record
from ..kernels.versions import backend
from ..models.description import Norm, ViT
from .block_layers import BlockLayers, backward_heads, normalise_heads
from .dtype import resolve_dtype
from .reference import Output
from .saved_activations import Mode, RecordedLayers, SavedBlock, SavedLastBlock, SavedPass, StaticWorkspace, TrunkPass, Workspace

OPERATIONS = ("attention", "cls_attention", "layer_norm", "linear_gelu", "linear_residual", "patch_embed")


class Fused:
    """A ViT prepared for one dtype: weights laid out once. Raises InputError for a dtype that it does not compute in."""

    def __init__(self, vit: ViT, dtype: torch.dtype | str = "auto", recompute: bool = False):
        self.mode = Mode(resolve_dtype(dtype, vit.device), recompute)
        self.vit = vit = vit.to(vit.device, self.mode.dtype)
        family = _family(vit)
        self.in_cpp = family is cpp  # not the module itself, which could not be copied with the engine
        self.recordable = self.in_cpp and not any(block.q_norm or block.k_norm for block in vit.blocks)  # those norms take operations of PyTorch
        self.num_read = len(vit.heads) if vit.pool == "token" else 0  # tokens of the last block that the heads read; 0: all
        self.embed = family.Embed(vit.embed.weight, vit.embed.bias, vit.position, vit.prefix, vit.patch_size)
        self.norm_pre: Any = vit.norm_pre and family.Norm(vit.norm_pre.weight, vit.norm_pre.bias, vit.norm_pre.eps)
        self.blocks = [BlockLayers(block, family) for block in vit.blocks[: len(vit.blocks) - bool(self.num_read)]]
        self.last: Any = BlockLayers(vit.blocks[-1], family, split_query=True) if self.num_read else None

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.mode.dtype

    @property
    def family(self) -> ModuleType:
        """The module of the layers in use."""
        return cpp if self.in_cpp else dispatched

    def describe(self, batch: int = 1) -> dict:
        """What runs: dtype, and the version of each operation, forward, of a batch of whole images."""
        if self.in_cpp:
            versions = dict.fromkeys(OPERATIONS, cpp.NAME)
        else:
            block, tokens = self.vit.blocks[0], self.vit.num_prefix + self.vit.num_patches
            versions = dispatched.versions(block.qkv.weight, batch, tokens, block.num_heads, block.width // block.num_heads)
        return {"dtype": str(self.dtype).removeprefix("torch."), "versions": versions}

    def workspace(self) -> Workspace:
        """A new workspace, for the results of one pass at a time."""
        return StaticWorkspace(self.dtype) if self.in_cpp else Workspace()

    def forward(
        self, images: Tensor, index: Tensor, augmentation: Tensor | None = None, workspace: Workspace | None = None, save: bool = True
    ) -> tuple[Output, Tensor, SavedPass]:
        """Logits and CLS row, the attention weights [B, H, Q, T] of the last block's CLS token, and what `backward` needs.

        images: float32 [B, C, H, W]. index: int [B, n]. augmentation: int [3] (dy, dx, flip). workspace: where results go; they lie there until the
        next pass. None: a new one. save: whether `backward` will be called.
        """
        workspace = workspace or self.workspace()
        with torch.no_grad():
            x = self.embed.forward(images, index, augmentation, workspace("x", len(images), *self._tokens(index)))
            trunk = self._forward_trunk(x, workspace, save)
        tail_input = trunk.output.detach().requires_grad_(save)
        with torch.set_grad_enabled(save):
            logits = _classify(self.vit, tail_input)
        output = Output(logits.detach(), trunk.weights[:, :, 0].mean(1)[:, self.vit.num_prefix :])
        return output, trunk.weights, SavedPass(images, index, augmentation, workspace, trunk, tail_input, logits)

    @torch.no_grad()
    def forward_patches(self, patches: Tensor, index: Tensor, workspace: Workspace | None = None) -> Tensor:
        """Logits [B, classes] of patches [B, n, C, p, p] at grid cells index [B, n], each with its own position embedding."""
        patches, workspace = patches.to(self.dtype), workspace or self.workspace()
        x = self.embed.embed(patches.flatten(2), index, workspace("x", len(patches), *self._tokens(index)))
        return _classify(self.vit, self._forward_trunk(x, workspace, save=False).output)

    def backward(self, saved: SavedPass, grad_logits: Tensor, out: Tensor | None = None) -> Tensor:
        """Gradient [B, C, H, W] of the images, float32, from that of the logits [B, classes]; in `out` where it is given."""
        (grad_tail,) = torch.autograd.grad(saved.logits, saved.tail_input, grad_logits.to(saved.logits.dtype))
        saved.logits = None  # frees the tail's graph
        workspace, trunk = saved.workspace, saved.trunk
        with torch.no_grad():
            place = workspace("grad read", *grad_tail.shape)
            grad = grad_tail.contiguous() if place is None else place.copy_(grad_tail)
            tokens = self._tokens(saved.index)[0]
            grad = self._run(trunk.recorded, "backward", grad, tokens, lambda: self._backward_blocks(trunk, grad, workspace))
            if out is None:
                out = torch.empty_like(saved.images, memory_format=torch.contiguous_format)
            return self.embed.backward(grad, saved.index, saved.augmentation, out)

    def _tokens(self, index: Tensor) -> tuple[int, int]:
        """Tokens of an image, and their width."""
        return self.vit.num_prefix + index.shape[1], self.vit.embed_dim

    def _run(self, recordings: dict[object, RecordedLayers], key: object, x: Tensor, tokens: int, layers: Callable[[], object]) -> Any:
        """The result of layers on x [B, ...]. In C++ their calls are recorded once for the same x, and the recording is run; it is made anew where
        the memory that it names has moved."""
        if not self.recordable:
            return layers()
        if key not in recordings or recordings[key].x is not x or not recordings[key].recording.fits():
            recordings.pop(key, None)
            recordings[key] = RecordedLayers(x, *record(layers, len(x), tokens))
        recordings[key].recording.run()
        return recordings[key].result

    def _forward_trunk(self, x: Tensor, workspace: Workspace, save: bool) -> TrunkPass:
        trunk = self._run(workspace.recorded, (self, save), x, x.shape[1], lambda: self._forward_blocks(x, workspace, save))
        if not self.num_read:
            qkv = trunk.blocks[-1].qkv
            trunk.weights = _attention_weights(qkv[:, :1, 0], qkv[:, :, 1])
        return trunk

    def _forward_blocks(self, x: Tensor, workspace: Workspace, save: bool) -> TrunkPass:
        trunk = TrunkPass()
        shape = batch, tokens, _ = x.shape
        save_activation, save_attended = save and not self.mode.recompute, self.family.Attention.saves_output
        if self.norm_pre:
            y, *statistics = self.norm_pre.forward(x, workspace("x pre", *shape))
            trunk.norm_pre, x = (x, *statistics), y
        for number, block in enumerate(self.blocks):
            i = str(number) if save else ""  # without backward every block may use the same memory
            width, hidden = block.width, block.hidden
            y, *norm1 = block.norm1.forward(x, workspace("y", *shape))
            qkv = block.qkv.forward(y, workspace("qkv" + i, batch, tokens, 3 * width)).unflatten(-1, (3, block.num_heads, -1))
            qkv, head_norms = normalise_heads(qkv, block.q_norm, block.k_norm)
            attended, lse = self.family.Attention.forward(qkv, workspace("attended" + i if save_attended else "attended", batch, tokens, width))
            mid = block.proj.forward_residual(attended, x, workspace("mid" + i, *shape))
            y, *norm2 = block.norm2.forward(mid, workspace("y", *shape))
            saved = workspace("activation" + i, batch, tokens, hidden) if save_activation else None
            a, saved = block.fc1.forward_activation(y, block.activation, save_activation, saved, workspace("a", batch, tokens, hidden))
            if save or block is self.blocks[-1]:
                attended_saved, saved = attended if save_attended else None, saved if save_activation else None
                trunk.blocks.append(SavedBlock(x, norm1, qkv, head_norms, attended_saved, lse, mid, norm2, saved))
            x = block.fc2.forward_residual(a, mid, workspace("x next" + i, *shape))
        trunk.output = x
        if self.num_read:
            self._forward_last_block(x, trunk, workspace)
        return trunk

    def _forward_last_block(self, x: Tensor, trunk: TrunkPass, workspace: Workspace) -> None:
        """The last block for the tokens that the heads read."""
        block, (batch, tokens, _) = self.last, x.shape
        y, *norm1 = block.norm1.forward(x, workspace("y", *x.shape))
        kv = block.keys_values.forward(y, workspace("kv", batch, tokens, 2 * block.width)).unflatten(-1, (2, block.num_heads, -1))
        x_read, y_read = (self.family.take_tokens(each, self.num_read) for each in (x, y))
        q, q_norms = normalise_heads(block.query.forward(y_read).unflatten(-1, (1, block.num_heads, -1)), block.q_norm)
        kv, k_norms = normalise_heads(kv, block.k_norm)
        attended, trunk.weights = self.family.ClsAttention.forward(q[:, :, 0], kv)
        mid = block.proj.forward_residual(attended, x_read)
        y, *norm2 = block.norm2.forward(mid)
        a, activation = block.fc1.forward_activation(y, block.activation)
        trunk.output = block.fc2.forward_residual(a, mid)
        trunk.last_block = SavedLastBlock(x, norm1, q[:, :, 0], kv, q_norms, k_norms, trunk.weights, mid, norm2, activation)

    def _backward_blocks(self, trunk: TrunkPass, grad: Tensor, workspace: Workspace) -> Tensor:
        if trunk.last_block is not None:
            grad = self._backward_last_block(trunk.last_block, grad, workspace)
        shape = grad.shape
        for block, saved in zip(reversed(self.blocks), reversed(trunk.blocks), strict=True):
            saved_activation, activation, hidden = saved.activation, block.activation, block.hidden
            if saved_activation is None:
                y, *_ = block.norm2.forward(saved.mid, workspace("y", *shape))
                saved_activation = block.fc1.recompute_saved(y, activation, workspace("activation", *shape[:2], hidden))
            grad_h = block.fc2.backward_activation(grad, saved_activation, activation, workspace("a", *shape[:2], hidden))
            grad_y = block.fc1.backward(grad_h, workspace("grad y", *shape))
            grad = block.norm2.backward(grad_y, grad, saved.mid, *saved.norm2, workspace("grad mid", *shape))
            grad_attended = block.proj.backward(grad, workspace("grad attended", *shape[:2], saved.qkv.shape[3] * saved.qkv.shape[4]))
            grad_qkv = self.family.Attention.backward(grad_attended, saved.qkv, saved.attended, saved.lse, workspace("grad qkv", *saved.qkv.shape))
            backward_heads(grad_qkv, saved.head_norms)
            grad_y = block.qkv.backward(grad_qkv.flatten(2), workspace("grad y", *shape))
            grad = block.norm1.backward(grad_y, grad, saved.x, *saved.norm1, workspace("grad", *shape))
        if trunk.norm_pre:
            grad = self.norm_pre.backward(grad, None, *trunk.norm_pre)
        return grad

    def _backward_last_block(self, saved: SavedLastBlock, grad: Tensor, workspace: Workspace) -> Tensor:
        """Gradient of all tokens [B, T, d] from that of the tokens that the heads read."""
        block, shape = self.last, saved.x.shape
        grad_h = block.fc2.backward_activation(grad, saved.activation, block.activation)
        grad_read = block.norm2.backward(block.fc1.backward(grad_h), grad, saved.mid, *saved.norm2)
        grad_attended = block.proj.backward(grad_read)
        grad_q, grad_kv = self.family.ClsAttention.backward(grad_attended, saved.q, saved.kv, saved.weights, workspace("grad kv", *saved.kv.shape))
        backward_heads(grad_q.unsqueeze(2), saved.q_norms)
        backward_heads(grad_kv, saved.k_norms)
        grad_y = block.keys_values.backward(grad_kv.flatten(2), workspace("grad y", *shape))
        self.family.add_tokens(grad_y, block.query.backward(grad_q.flatten(2)))
        grad = block.norm1.backward(grad_y, None, saved.x, *saved.norm1, workspace("grad", *shape))
        self.family.add_tokens(grad, grad_read)
        return grad


def _family(vit: ViT) -> ModuleType:
    """The layers for this device and dtype: C++ on the CPU where it can be had and nothing else is asked for."""
    if vit.device.type != "cpu" or backend() != "auto":
        return dispatched
    weights = [vit.embed.weight, *(layer.weight for block in vit.blocks for layer in (block.qkv, block.proj, block.fc1, block.fc2))]
    return dispatched if cpp.unsupported(*weights) or cpp.ensure_built(vit.embed.weight.dtype) else cpp


def _attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Softmax of scaled scores [B, H, Q, T], float32, of q [B, Q, H, D] and k [B, T, H, D]."""
    return (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).float().mul(q.shape[-1] ** -0.5).softmax(-1)


def _classify(vit: ViT, x: Tensor) -> Tensor:
    """Logits [B, classes] from the last block's tokens: all, or those that the heads read."""
    x = _normalise(x, vit.norm)
    pooled = [x[:, vit.num_prefix :].mean(1)] if vit.pool == "avg" else [x[:, i] for i in range(len(vit.heads))]
    logits = [F.linear(_normalise(token, vit.fc_norm), head.weight, head.bias) for token, head in zip(pooled, vit.heads, strict=True)]
    return torch.stack(logits).float().mean(0)


def _normalise(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
