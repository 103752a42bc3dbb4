"""A quantised ViT that multiplies integers on the CPU: oneDNN's int8 linear layers, with codes and scales from the calibration.

Codes of fewer than eight bits are held in eight. Between linear layers (LayerNorm, attention, residuals) it computes in float32, as the
simulation does.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .model import Facts
from .network import QuantizedLinear, QuantizedViT
from .recipe import Recipe

SAFE = 64  # the largest weight code for which 255 * code * 2 fits in 16 bits
POST_GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # activations that oneDNN applies itself


@cache
def products_saturate() -> bool:
    """Whether int8 GEMMs overflow on this processor: without VNNI it adds pairs of byte products in 16 bits."""
    x, weight = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((8, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zeros, ones = torch.zeros(8, dtype=torch.int64), torch.ones(8)
    result = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return int(result[0, 0]) != 255 * 127 * 64


class Int8Linear(QuantizedLinear):
    """A linear layer of integers, on the CPU."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], settings: tuple[float, int] | None, recipe: Recipe):
        super().__init__(name, tensors, settings, recipe)
        self.wide = recipe.weight_bits == 8
        self._packed: tuple[Tensor, Tensor, Tensor] | None = None

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes as oneDNN lays them out, scales and zero points of the output channels; made when they are first needed."""
        if self._packed is None:
            codes, scales = self.codes, self.scales
            if self.wide and products_saturate():  # seven bits and a sign of the weights are exact everywhere
                codes, scales = torch.round(codes.float() * (SAFE / 127)).to(torch.int8), scales * (127 / SAFE)
            self._packed = torch.ops.onednn.qlinear_prepack(codes, None), scales, torch.zeros(len(scales), dtype=torch.int64)
        return self._packed

    def quantise(self, x: Tensor) -> Tensor:
        """The codes uint8 [..., in] of an input float32 [..., in]."""
        return self.coded(x)[1]

    def multiply(self, codes: Tensor, then: "Int8Linear | None" = None, post: tuple[str, str] = ("none", "")) -> Tensor:
        """post(linear) of the input's codes [..., in]: float32 [..., out], or the codes that `then` takes."""
        scale, zero, dtype = (1.0, 0, torch.float32) if then is None else (then.input_scale.item(), int(then.input_zero.item()), torch.uint8)
        packed, scales, zeros = self._weights()
        mine = self.input_scale.item(), int(self.input_zero.item())
        made = torch.ops.onednn.qlinear_pointwise(codes, *mine, packed, scales, zeros, self.bias, scale, zero, dtype, post[0], [], post[1])
        return made if then is None or then.most == 255 else made.clamp_(max=then.most)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_float:
            return F.linear(x, self.codes.float() * self.scales[:, None], self.bias)
        return self.multiply(self.quantise(x))

    def __getstate__(self) -> dict[str, Any]:
        """Without oneDNN's layout, which can neither be copied nor saved."""
        return {**self.__dict__, "_packed": None}

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._packed = None


class Int8ViT(QuantizedViT):
    """The deployable model, on the CPU.

    Where int8 GEMMs overflow (no VNNI, `products_saturate`), weights are rounded from eight bits to seven when they are first used; the file keeps
    eight.
    """

    KIND, LINEAR = "int8", Int8Linear

    def __init__(self, facts: Facts, tensors: Mapping[str, Tensor], inputs: Mapping[str, tuple[float, int]]):
        super().__init__(facts, tensors, inputs)

    def _mlp(self, name: str, x: Tensor, activation: str) -> Tensor:
        if activation not in POST_GELU:
            return super()._mlp(name, x, activation)
        fc1, fc2 = self._held(f"{name}.mlp.fc1"), self._held(f"{name}.mlp.fc2")
        return fc2.multiply(fc1.multiply(fc1.quantise(x), then=fc2, post=("gelu", POST_GELU[activation])))

    def _refuse_device(self, device: torch.device) -> None:
        if device.type == "cuda":
            raise InputError("an int8 model runs on the CPU: on a GPU use the simulation")
