"""A quantised ViT as a module of its own: codes, scales and float tensors by the float model's names, and the pass through them.

The same network is simulated and deployed; subclasses of it say how a linear layer is computed.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError
from ..surroundings import neutral
from .files import write
from .model import Facts, Images, as_patches, check_tensors
from .recipe import Recipe

FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Codes(nn.Module):
    """The scale float32 [] and the zero point int32 [] of an activation's codes, 0 to 2^bits - 1; None for one that stays in float."""

    input_scale: Tensor
    input_zero: Tensor

    def __init__(self, name: str, settings: tuple[float, int] | None, recipe: Recipe):
        super().__init__()
        self.most = 2**recipe.activation_bits - 1
        if settings is None:
            self.register_buffer("input_scale", None)
            self.register_buffer("input_zero", None)
            return
        scale, zero = settings
        if not (0 < scale < math.inf and 0 <= zero <= self.most):
            raise InputError(f"{name} needs a positive scale and a zero point from 0 to {self.most}, got {scale} and {zero}")
        self.register_buffer("input_scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("input_zero", torch.tensor(zero, dtype=torch.int32))

    @property
    def in_float(self) -> bool:
        return self.input_scale is None

    def simulated(self, x: Tensor) -> Tensor:
        """x as its codes tell it; x itself where it stays in float."""
        if self.in_float:
            return x
        if x.is_cuda:
            return torch.fake_quantize_per_tensor_affine(x, self.input_scale, self.input_zero, 0, self.most)
        return self.coded(x)[0].dequantize()  # on the CPU 20 times as fast as fake_quantize, which also makes a mask

    def coded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [...] on the CPU as PyTorch's quantised tensor, and its codes uint8 [...] in the same memory."""
        coded = torch.quantize_per_tensor(x.contiguous(), self.input_scale.item(), int(self.input_zero.item()), torch.quint8)
        codes = torch.empty(0, dtype=torch.uint8).set_(coded.untyped_storage(), coded.storage_offset(), coded.shape, coded.stride())
        return coded, codes.clamp_(max=self.most) if self.most < 255 else codes


class LogCodes(Codes):
    """The codes of softmax weights in steps of half a power of two: code c stands for m 2^(-c / 2), m the greatest weight of the calibration, the
    scale times the number of steps; what is too small for the last code is zero."""

    def simulated(self, x: Tensor) -> Tensor:
        most = self.input_scale * self.most
        codes = torch.round(-2 * torch.log2(x / most)).clamp_(min=0)
        return torch.where(codes <= self.most, most * torch.exp2(-codes / 2), 0.0)


class QuantizedLinear(Codes):
    """One linear layer: codes int8 [out, in], a scale float32 [out] per output channel, the bias float32 [out], and the codes of its input."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, name: str, tensors: Mapping[str, Tensor], settings: tuple[float, int] | None, recipe: Recipe):
        super().__init__(name, settings, recipe)
        codes, scales, bias = tensors[f"{name}.codes"], tensors[f"{name}.scales"], tensors.get(f"{name}.bias")
        least, most = recipe.weight_codes
        if codes.dtype != torch.int8 or codes.ndim != 2 or int(codes.min()) < least or int(codes.max()) > most:
            raise InputError(f"{name} needs int8 codes [out, in] from {least} to {most}")
        for each in (scales, bias) if bias is not None else (scales,):
            if each.shape != codes.shape[:1] or each.dtype != torch.float32 or not torch.isfinite(each).all():
                raise InputError(f"{name} needs scales and a bias of finite float32 [{len(codes)}]")
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scales", scales.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer [..., out] of x float32 [..., in]."""
        raise NotImplementedError


class QuantizedViT(nn.Module):
    """Logits [B, classes] of images in any of their forms.

    A module like another: its codes and scales are buffers, its float tensors frozen parameters, `state_dict` holds both. It moves between devices.
    It computes in float32 alone and is not trained (InputError).
    """

    KIND = ""  # in files
    LINEAR: type[QuantizedLinear]

    def __init__(self, facts: Facts, tensors: Mapping[str, Tensor], inputs: Mapping[str, tuple[float, int]]):
        """tensors: per linear layer `.codes` int8, `.scales` and `.bias`, everything else as in the float model. inputs: scale and zero point of each
        quantised activation (`Facts.activations`). Raises InputError where they do not fit one another."""
        super().__init__()
        check_tensors(facts, tensors, inputs)
        self.facts = facts
        for name in facts.linears():
            _put(self, name, self.LINEAR(name, tensors, inputs.get(name), facts.recipe))
        for name in (*facts.operands(), *facts.points()):
            kind = LogCodes if facts.recipe.reparametrized and name.endswith(".weights") else Codes
            _put(self, name, kind(name, inputs[name], facts.recipe))
        taken = {f"{name}.{part}" for name in facts.linears() for part in ("codes", "scales", "bias")}
        for name in tensors.keys() - taken:
            _put(self, name, nn.Parameter(tensors[name].contiguous(), requires_grad=False))

    @neutral(grad=False)
    def forward(self, images: Images) -> Tensor:
        """images: normalised pixels [B, C, H, W], SparseImages, or (patches [B, n, C, p, p], index int64 [B, n])."""
        patches, index = as_patches(self.facts, images)
        return self.logits(patches, index) if len(patches) else torch.empty(0, self.facts.num_classes, device=self.device)

    @property
    def device(self) -> torch.device:
        """Of codes and weights."""
        return self._tensor("prefix").device

    @neutral(grad=False)
    def logits(self, patches: Tensor, index: Tensor) -> Tensor:
        """Logits [B, classes] of patches [B, n, C, p, p] at cells index int64 [B, n]."""
        a = self.facts.architecture
        x = self._linear("embed", patches.to(self.device, torch.float32).flatten(2))
        x = self._point("tokens", torch.cat([self._tensor("prefix").expand(len(x), -1, -1), x], dim=1))
        if self._held("position") is not None:
            x = self._point("embedded", x + self._positions(index.to(self.device)))
        x = self._point("norm_pre_output", self._norm("norm_pre", x))
        for i in range(a["depth"]):
            x = self._block(i, x)
        x = self._norm("norm", x)
        read = [x[:, a["prefix"] :].mean(1)] if a["pool"] == "avg" else [x[:, i] for i in range(a["heads"])]
        logits = [self._point(f"head_outputs.{i}", self._linear(f"heads.{i}", self._norm("fc_norm", token))) for i, token in enumerate(read)]
        return torch.stack(logits).mean(0)

    def _positions(self, index: Tensor) -> Tensor:
        """Position embeddings [B, prefix + n, d] of the prefix tokens and of cells index [B, n]."""
        prefix, cells = self._tensor("prefix"), self._tensor("position")
        mine = self._held("prefix_position")  # None in files of version 0.1.0, whose prefix holds its position
        table = self._point("positions", torch.cat([torch.zeros_like(prefix) if mine is None else mine, cells]))
        first = torch.arange(len(prefix), device=index.device).expand(len(index), -1)
        return F.embedding(torch.cat([first, index + len(prefix)], dim=1), table)

    def _block(self, i: int, x: Tensor) -> Tensor:
        name = f"blocks.{i}"
        qkv = self._linear(f"{name}.attn.qkv", self._norm(f"{name}.norm1", x))
        qkv = self._point(f"{name}.attn.qkv_output", qkv).unflatten(-1, (3, self.facts.of_block("num_heads", i), -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = self._attend(name, self._norm(f"{name}.attn.q_norm", q), self._norm(f"{name}.attn.k_norm", k), v)
        projected = self._point(f"{name}.attn.proj_output", self._linear(f"{name}.attn.proj", attended.transpose(1, 2).flatten(2)))
        x = self._point(f"{name}.attn_sum", x + self._scaled(f"{name}.ls1", projected))
        fed = self._point(f"{name}.mlp.fc2_output", self._mlp(name, self._norm(f"{name}.norm2", x), self.facts.of_block("activation", i)))
        return self._point(f"{name}.mlp_sum", x + self._scaled(f"{name}.ls2", fed))

    def _attend(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [B, H, T, D] of q, k and v [B, H, T, D]."""
        if self.facts.recipe.published:
            scores = self._point(f"{name}.attn.scores", (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1))
            return scores.softmax(-1) @ v
        if not self.facts.recipe.operands:
            return F.scaled_dot_product_attention(q, k, v)
        query, key, weights, value = (self._held(f"{name}.attn.{part}") for part in ("query", "key", "weights", "value"))
        scores = query.simulated(q * q.shape[-1] ** -0.5) @ key.simulated(k.transpose(-2, -1))
        return weights.simulated(scores.softmax(-1)) @ value.simulated(v)

    def _mlp(self, name: str, x: Tensor, activation: str) -> Tensor:
        return self._linear(f"{name}.mlp.fc2", FUNCTIONS[activation](self._linear(f"{name}.mlp.fc1", x)))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return self._held(name)(x)

    def _point(self, name: str, x: Tensor) -> Tensor:
        """x as the codes of that name tell it; x itself where the recipe has no such point."""
        codes = self._held(name)
        return x if codes is None else codes.simulated(x)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self._held(f"{name}.weight")
        return x if weight is None else F.layer_norm(x, weight.shape, weight, self._held(f"{name}.bias"), self.facts.architecture["eps"][name])

    def _scaled(self, name: str, x: Tensor) -> Tensor:
        gamma = self._held(f"{name}.gamma")
        return x if gamma is None else x * gamma

    def _held(self, name: str) -> Any:
        """The layer or tensor of that name; None where there is none."""
        found: Any = self
        for part in name.split("."):
            found = getattr(found, part, None)
        return found

    def _tensor(self, name: str) -> Tensor:
        return self._held(name)

    def tensors(self) -> dict[str, Tensor]:
        """Codes, scales and float tensors, as the constructor takes them, on the CPU."""
        held = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        return {name: tensor for name, tensor in held.items() if not name.endswith((".input_scale", ".input_zero"))}

    def inputs(self) -> dict[str, tuple[float, int]]:
        """Scale and zero point of every quantised activation, as the constructor takes them."""
        codes = ((name, part) for name, part in self.named_modules() if isinstance(part, Codes) and not part.in_float)
        return {name: (part.input_scale.item(), int(part.input_zero.item())) for name, part in codes}

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write codes, scales and the float tensors (safetensors) and the facts (JSON) to a folder; `load_quantized` reads it. Raises InputError
        where the folder is not empty and not `force`."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        return write(folder, self.KIND, self.facts, lambda path: save_file(tensors, path), self.inputs(), force=force)

    def requires_grad_(self, requires_grad: bool = True) -> "QuantizedViT":
        if requires_grad:
            raise InputError("a quantised model is calibrated, not trained: train the float model and quantise it again")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedViT":  # of nn.Module: to(), cuda(), half() ...
        moved = fn(torch.zeros(1, device=self.device))
        if moved.dtype != torch.float32:
            raise InputError(f"a quantised model computes in float32, not {str(moved.dtype).removeprefix('torch.')}: move it to another device only")
        self._refuse_device(moved.device)
        return super()._apply(fn, recurse)

    def _refuse_device(self, device: torch.device) -> None:
        """Raise InputError for a device that it does not run on."""

    def extra_repr(self) -> str:
        return f"{self.facts.name}, {self.facts.recipe}"


def _put(root: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Hang `value` into the tree of modules under a dotted name."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    setattr(root, leaf, value)
