"""A W8/A8 ViT that multiplies integers on the CPU: oneDNN's int8 linear layers, with codes and scales from torchao's graph.

Needs no torchao. Between linear layers (LayerNorm, attention, residuals) it computes in float32, as the simulation does.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from .files import write
from .model import Facts, QuantizedViT
from .recipe import Recipe

SAFE = 64  # the largest weight code for which 255 * code * 2 fits in 16 bits
POST_GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # activations that oneDNN applies itself


def can_int8(recipe: Recipe) -> None:
    """Raise InputError where there is no integer model of these widths."""
    if (recipe.weight_bits, recipe.activation_bits) != (8, 8):
        raise InputError(f"an int8 model needs 8 bits for weights and activations, this one is {recipe}: only the simulation has other widths")
    if recipe.attention:
        raise InputError("an int8 model keeps attention's two GEMMs in float32: quantise with attention=False")


@cache
def products_saturate() -> bool:
    """Whether int8 GEMMs overflow on this processor: without VNNI it adds pairs of byte products in 16 bits."""
    x, weight = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((8, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zeros, ones = torch.zeros(8, dtype=torch.int64), torch.ones(8)
    result = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return int(result[0, 0]) != 255 * 127 * 64


class Int8Linear:
    """One linear layer: codes int8 [out, in], scale per output channel, and scale and zero point of its input."""

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None, input_scale: float, input_zero: int):
        self.codes, self.scales, self.bias = codes, scales, bias
        self.input_scale, self.input_zero = input_scale, input_zero
        if products_saturate():  # seven bits and a sign of the weights are exact everywhere
            codes, scales = torch.round(codes.float() * (SAFE / 127)).to(torch.int8), scales * (127 / SAFE)
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self._scales, self._zeros = scales, torch.zeros(len(scales), dtype=torch.int64)

    def quantise(self, x: Tensor) -> Tensor:
        """The codes uint8 [..., in] of an input float32 [..., in]."""
        coded = torch.quantize_per_tensor(x, self.input_scale, self.input_zero, torch.quint8)
        return torch.empty(0, dtype=torch.uint8).set_(coded.untyped_storage(), coded.storage_offset(), coded.shape, coded.stride())

    def __call__(self, codes: Tensor, then: "Int8Linear | None" = None, post: tuple[str, str] = ("none", "")) -> Tensor:
        """post(linear) of the input's codes [..., in]: float32 [..., out], or the codes that `then` takes."""
        scale, zero, dtype = (1.0, 0, torch.float32) if then is None else (then.input_scale, then.input_zero, torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            codes,
            self.input_scale,
            self.input_zero,
            self._packed,
            self._scales,
            self._zeros,
            self.bias,
            scale,
            zero,
            dtype,
            post[0],
            [],
            post[1],
        )


class Int8ViT(QuantizedViT):
    """The deployable model, on the CPU.

    Where int8 GEMMs overflow (no VNNI, `products_saturate`), weights are rounded from eight bits to seven when the model is made; the file keeps
    eight.
    """

    def __init__(self, facts: Facts, tensors: dict[str, Tensor], inputs: dict[str, tuple[float, int]]):
        """tensors: per linear layer `.codes` int8, `.scales` and `.bias`, everything else as in the float model. inputs: scale and zero point of each
        linear layer's input."""
        super().__init__(facts)
        can_int8(facts.recipe)
        self.architecture, self.tensors, self.inputs = facts.architecture, tensors, inputs
        self.linears = {
            name: Int8Linear(tensors[f"{name}.codes"], tensors[f"{name}.scales"], tensors.get(f"{name}.bias"), *settings)
            for name, settings in inputs.items()
        }

    def logits(self, patches: Tensor, index: Tensor) -> Tensor:
        a = self.architecture
        with torch.no_grad():
            x = self._linear("embed", patches.to("cpu", torch.float32).flatten(2))
            if "position" in self.tensors:
                x = x + F.embedding(index.cpu(), self.tensors["position"])
            x = self._norm("norm_pre", torch.cat([self.tensors["prefix"].expand(len(x), -1, -1), x], dim=1))
            for i in range(a["depth"]):
                x = self._block(f"blocks.{i}", x)
            x = self._norm("norm", x)
            read = [x[:, a["prefix"] :].mean(1)] if a["pool"] == "avg" else [x[:, i] for i in range(a["heads"])]
            logits = [self._linear(f"heads.{i}", self._norm("fc_norm", token.contiguous())) for i, token in enumerate(read)]
            return torch.stack(logits).mean(0)

    def _block(self, name: str, x: Tensor) -> Tensor:
        qkv = self._linear(f"{name}.attn.qkv", self._norm(f"{name}.norm1", x)).unflatten(-1, (3, self.architecture["num_heads"], -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self._norm(f"{name}.attn.q_norm", q), self._norm(f"{name}.attn.k_norm", k)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self._scaled(f"{name}.ls1", self._linear(f"{name}.attn.proj", attended))
        fc1, fc2 = self.linears[f"{name}.mlp.fc1"], self.linears[f"{name}.mlp.fc2"]
        codes = fc1.quantise(self._norm(f"{name}.norm2", x))
        activation = self.architecture["activation"]
        if activation in POST_GELU:
            hidden = fc1(codes, then=fc2, post=("gelu", POST_GELU[activation]))
        else:
            hidden = fc1(codes)
            hidden = fc2.quantise(hidden * torch.sigmoid(1.702 * hidden))
        return x + self._scaled(f"{name}.ls2", fc2(hidden))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        linear = self.linears[name]
        return linear(linear.quantise(x.contiguous()))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.tensors.get(f"{name}.weight")
        return x if weight is None else F.layer_norm(x, weight.shape, weight, self.tensors.get(f"{name}.bias"), self.architecture["eps"][name])

    def _scaled(self, name: str, x: Tensor) -> Tensor:
        gamma = self.tensors.get(f"{name}.gamma")
        return x if gamma is None else x * gamma

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write codes, scales and the float tensors (safetensors) and the facts (JSON) to a folder; `load_quantized` reads it."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        return write(folder, "int8", self.facts, lambda path: save_file(tensors, path), {"inputs": self.inputs}, force=force)
