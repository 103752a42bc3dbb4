"""The ONNX graph of a ViT, float or quantised: what network.py computes, node by node, out of the same facts, tensors and codes.

A linear layer multiplies DequantizeLinear of its int8 codes; an activation that the recipe rounds goes through QuantizeLinear and DequantizeLinear.
Codes of fewer than eight bits are held in eight: the activation is clipped to what they reach. QuantizeLinear has no logarithmic codes: those of the
softmax's output are looked up.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..version import __version__
from .model import Facts

OPSET, IR = 20, 9  # the first with Gelu; onnxruntime 1.17 and later
INPUT, OUTPUT = "images", "logits"
GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # our names, and the attribute of Gelu


class Nodes:
    """Nodes and initialisers of a graph that grows; each node is named after what it makes."""

    def __init__(self) -> None:
        self._onnx = needed()
        self.made: list[Any] = []
        self.held: dict[str, Any] = {}
        self.at = ""  # the block that is being built

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node of one output, by its name."""
        name = name or f"{self.at}{kind}_{len(self.made)}"
        self.made.append(self._onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def split(self, x: str, parts: int, axis: int) -> list[str]:
        """Equal parts of x along an axis."""
        name = f"{self.at}Split_{len(self.made)}"
        outputs = [f"{name}.{i}" for i in range(parts)]
        self.made.append(self._onnx.helper.make_node("Split", [x], outputs, name=name, axis=axis, num_outputs=parts))
        return outputs

    def constant(self, name: str, values: Tensor) -> str:
        """An initialiser, held once."""
        if name not in self.held:
            self.held[name] = self._onnx.numpy_helper.from_array(values.detach().cpu().contiguous().numpy(), name)
        return name

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self.constant(f"number {value!r}", torch.tensor(value, dtype=torch.float32))

    def whole(self, *values: int) -> str:
        """A list of int64."""
        return self.constant(f"whole {values}", torch.tensor(values, dtype=torch.int64))

    def reshape(self, x: str, *shape: int) -> str:
        """A size of 0 is that of x at the same place."""
        return self.add("Reshape", x, self.whole(*shape))


class Network(Nodes):
    """The graph of one ViT: normalised pixels float32 [batch, C, H, W] -> logits float32 [batch, classes], any batch."""

    def __init__(self, facts: Facts, tensors: Mapping[str, Tensor], inputs: Mapping[str, tuple[float, int]]):
        """tensors: as a QuantizedViT takes them; a linear layer that has `.weight` [out, in] for codes and scales stays in float. inputs: scale and
        zero point of each quantised activation."""
        super().__init__()
        self.facts, self.tensors, self.inputs = facts, tensors, inputs
        self.most = 2**facts.recipe.activation_bits - 1

    def model(self, about: Mapping[str, str]) -> Any:
        """The ModelProto. about: its metadata."""
        helper, kind, facts = self._onnx.helper, self._onnx.TensorProto.FLOAT, self.facts
        self.add("Identity", self._logits(INPUT), name=OUTPUT)
        image = helper.make_tensor_value_info(INPUT, kind, ["batch", facts.channels, *facts.image_size], "normalised pixels")
        logits = helper.make_tensor_value_info(OUTPUT, kind, ["batch", facts.num_classes])
        graph = helper.make_graph(self.made, facts.name, [image], [logits], initializer=list(self.held.values()))
        versions = {"opset_imports": [helper.make_opsetid("", OPSET)], "ir_version": IR}
        model = helper.make_model(graph, producer_name="smi", producer_version=__version__, **versions)
        helper.set_model_props(model, dict(about))
        return model

    def _logits(self, images: str) -> str:
        a = self.facts.architecture
        x = self._point("tokens", self._tokens(images))
        if "position" in self.tensors:
            x = self._point("embedded", self.add("Add", x, self._positions()))
        x = self._point("norm_pre_output", self._norm("norm_pre", x))
        for i in range(a["depth"]):
            self.at = f"blocks.{i}."
            x = self._block(f"blocks.{i}", i, x)
        self.at = ""
        x = self._norm("norm", x)
        if a["pool"] == "avg":
            cells = self.add("Slice", x, self.whole(a["prefix"]), self.whole(2**31 - 1), self.whole(1))
            read = [self.add("ReduceMean", cells, self.whole(1), keepdims=0)]
        else:
            read = [self.add("Gather", x, self.constant(f"token {i}", torch.tensor(i)), axis=1) for i in range(a["heads"])]
        logits = [self._point(f"head_outputs.{i}", self._linear(f"heads.{i}", self._norm("fc_norm", token))) for i, token in enumerate(read)]
        return logits[0] if len(logits) == 1 else self.add("Mul", self.add("Add", *logits), self.number(0.5))

    def _tokens(self, images: str) -> str:
        """Prefix tokens and embedded patches [batch, P + N, d]. A convolution: what onnxruntime makes of a MatMul of float32 with int8 codes rounds
        the float32 side too (MatMulNBits)."""
        (rows, columns), p = self.facts.grid, self.facts.patch_size
        weight = self._weight("embed", lambda held: held.unflatten(1, (self.facts.channels, p, p)), axis=0)
        made = self.add("Conv", self._point("embed", images), weight, *self._bias("embed"), strides=[p, p])
        x = self.add("Transpose", self.reshape(made, 0, -1, rows * columns), perm=[0, 2, 1])
        prefix = self.tensors["prefix"]
        size = self.add("Concat", self.add("Shape", x, start=0, end=1), self.whole(*prefix.shape), axis=0)
        return self.add("Concat", self.add("Expand", self.constant("prefix", prefix), size), x, axis=1)

    def _positions(self) -> str:
        """Position embeddings [P + N, d], as codes where the recipe rounds them."""
        mine = self.tensors.get("prefix_position")
        table = torch.cat([torch.zeros_like(self.tensors["prefix"]) if mine is None else mine, self.tensors["position"]])
        if "positions" not in self.inputs:
            return self.constant("position", table)
        scale, zero = self.inputs["positions"]
        codes = torch.quantize_per_tensor(table, scale, zero, torch.quint8).int_repr().clamp(max=self.most)
        return self.add("DequantizeLinear", self.constant("positions.codes", codes), *self._scale_and_zero("positions"))

    def _block(self, name: str, i: int, x: str) -> str:
        heads, activation = self.facts.of_block("num_heads", i), self.facts.of_block("activation", i)
        qkv = self._point(f"{name}.attn.qkv_output", self._linear(f"{name}.attn.qkv", self._norm(f"{name}.norm1", x)))
        width = self.tensors[f"{name}.attn.proj.{'codes' if f'{name}.attn.proj.codes' in self.tensors else 'weight'}"].shape[1]
        apart = self.add("Transpose", self.reshape(qkv, 0, 0, 3 * heads, width // heads), perm=[0, 2, 1, 3])
        q, k, v = self.split(apart, 3, axis=1)
        attended = self._attend(name, self._norm(f"{name}.attn.q_norm", q), self._norm(f"{name}.attn.k_norm", k), v, width // heads)
        together = self.reshape(self.add("Transpose", attended, perm=[0, 2, 1, 3]), 0, 0, width)
        projected = self._point(f"{name}.attn.proj_output", self._linear(f"{name}.attn.proj", together))
        x = self._point(f"{name}.attn_sum", self.add("Add", x, self._scaled(f"{name}.ls1", projected)))
        hidden = self._activated(self._linear(f"{name}.mlp.fc1", self._norm(f"{name}.norm2", x)), activation)
        fed = self._point(f"{name}.mlp.fc2_output", self._linear(f"{name}.mlp.fc2", hidden))
        return self._point(f"{name}.mlp_sum", self.add("Add", x, self._scaled(f"{name}.ls2", fed)))

    def _attend(self, name: str, q: str, k: str, v: str, width: int) -> str:
        """Attention [batch, H, T, D] of q, k and v [batch, H, T, D]."""
        query, key, weights, value = (f"{name}.attn.{part}" for part in ("query", "key", "weights", "value"))
        q = self._point(query, self.add("Mul", q, self.number(width**-0.5)))
        scores = self._point(f"{name}.attn.scores", self.add("MatMul", q, self.add("Transpose", self._point(key, k), perm=[0, 1, 3, 2])))
        shares = self.add("Softmax", scores, axis=-1)
        shares = self._log_point(weights, shares) if self.facts.recipe.reparametrized and weights in self.inputs else self._point(weights, shares)
        return self.add("MatMul", shares, self._point(value, v))

    def _activated(self, x: str, activation: str) -> str:
        if activation in GELU:
            return self.add("Gelu", x, approximate=GELU[activation])
        return self.add("Mul", x, self.add("Sigmoid", self.add("Mul", x, self.number(1.702))))

    def _linear(self, name: str, x: str) -> str:
        """x W^T + b, W^T [in, out]."""
        x = self.add("MatMul", self._point(name, x), self._weight(name, torch.t, axis=1))
        bias = self._bias(name)
        return self.add("Add", x, *bias) if bias else x

    def _weight(self, name: str, laid_out: Callable[[Tensor], Tensor], axis: int) -> str:
        """laid_out(W [out, in]), of its codes and a scale for each place on the axis, or itself."""
        codes = self.tensors.get(f"{name}.codes")
        if codes is None:
            return self.constant(f"{name}.weight", laid_out(self.tensors[f"{name}.weight"]))
        held = self.constant(f"{name}.codes", laid_out(codes)), self.constant(f"{name}.scales", self.tensors[f"{name}.scales"])
        return self.add("DequantizeLinear", *held, name=f"{name}.weight", axis=axis)

    def _bias(self, name: str) -> list[str]:
        """Its name, where there is one."""
        return [self.constant(f"{name}.bias", self.tensors[f"{name}.bias"])] if f"{name}.bias" in self.tensors else []

    def _point(self, name: str, x: str) -> str:
        """x as the codes of that name tell it; x itself where there are none."""
        if name not in self.inputs:
            return x
        scale, zero = self.inputs[name]
        if self.most < 255:
            x = self.add("Clip", x, self.number(-zero * scale), self.number((self.most - zero) * scale))
        held = self._scale_and_zero(name)
        return self.add("DequantizeLinear", self.add("QuantizeLinear", x, *held, name=f"{name}.quantized"), *held, name=f"{name}.dequantized")

    def _scale_and_zero(self, name: str) -> tuple[str, str]:
        scale, zero = self.inputs[name]
        return self.constant(f"{name}.scale", torch.tensor(scale)), self.constant(f"{name}.zero", torch.tensor(zero, dtype=torch.uint8))

    def _log_point(self, name: str, x: str) -> str:
        """network.LogCodes: the code is -2 log2(x / m), rounded; its value is looked up, zero beyond the last code."""
        greatest = torch.tensor(self.inputs[name][0]) * self.most
        table = torch.cat([greatest * torch.exp2(-torch.arange(self.most + 1) / 2), torch.zeros(1)])
        halves = self.add("Mul", self.add("Log", self.add("Div", x, self.number(greatest.item()))), self.number(-2 / math.log(2)))
        codes = self.add("Round", self.add("Clip", halves, self.number(0.0), self.number(self.most + 1.0)))
        return self.add("Gather", self.constant(f"{name}.values", table), self.add("Cast", codes, to=self._onnx.TensorProto.INT32))

    def _norm(self, name: str, x: str) -> str:
        parts = [f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in self.tensors]
        if not parts:
            return x
        held = (self.constant(part, self.tensors[part]) for part in parts)
        return self.add("LayerNormalization", x, *held, axis=-1, epsilon=self.facts.architecture["eps"][name])

    def _scaled(self, name: str, x: str) -> str:
        gamma = self.tensors.get(f"{name}.gamma")
        return x if gamma is None else self.add("Mul", x, self.constant(f"{name}.gamma", gamma))


def needed() -> Any:
    """onnx; raises InputError where it is missing."""
    try:
        import onnx
    except ImportError as error:
        raise InputError(f"ONNX files need onnx: pip install 'sparse-model-inversion[onnx]' ({error})") from error
    return onnx
