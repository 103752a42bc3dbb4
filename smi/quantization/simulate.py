"""Post-training quantisation, calibrated with synthetic or real images, on torchao's PT2E.

export (patches, index) -> logits  ->  observers placed by torchao  ->  a forward on the retained patches  ->  integers and their scales

The graph ends there: codes and scales go into a module of their own (network.py), which is what runs and what is saved.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from ..errors import InputError
from ..models.unwrap import unwrapped
from ..plain import whole
from ..surroundings import at_the_door, seeded
from .export import Tokens, describe_for, example, export
from .int8 import Int8ViT, can_int8
from .model import Facts, Images, as_patches, batches
from .network import QuantizedLinear, QuantizedViT
from .points import Places, find_places
from .recipe import LINEAR_INPUTS, Recipe


@at_the_door
def quantize(
    model: nn.Module,
    images: Images,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    ranges: str = "minmax",
    percentile: float = Recipe.percentile,
    weight_ranges: str = "minmax",
    attention: bool = False,
    recipe: str = LINEAR_INPUTS,
    batch_size: int = 32,
) -> "SimulatedViT":
    """A quantised copy of a timm ViT, calibrated with `images`.

    images: SparseImages, of which only the retained patches are fed; normalised pixels [M, C, H, W]; or (patches [M, n, C, p, p], index [M, n]).
    weight_bits, activation_bits: 2 to 8; weights per output channel and symmetric, activations per tensor and asymmetric.
    recipe: which activations. "linear-inputs": those of the linear layers, as hardware that multiplies integers needs them. "published": all but the
    softmax's output, the residual stream included, by the formulas of PSAQ-ViT's protocol.
    ranges: of the activations: "minmax" (as published), "percentile" (from the (100 - percentile)-th to the percentile-th) or "mse" (least squared
    error). weight_ranges: "minmax" or "mse".
    attention: quantise both operands of attention's two GEMMs as well; not with recipe="published".
    batch_size: images at a time.

    Returns a simulation in float32; its `int8()` multiplies integers on the CPU. Raises InputError for what does not fit the model
    and where torchao is missing, RunError with the module that cannot be exported.
    """
    how = Recipe(weight_bits, activation_bits, ranges, percentile, weight_ranges, attention, recipe)
    batch_size = whole(1)("batch_size", batch_size)
    vit, model = describe_for(model, images), unwrapped(model)
    if vit.embed.weight.dtype != torch.float32:
        raise InputError(f"a model to quantise must be float32, this one is {str(vit.embed.weight.dtype).removeprefix('torch.')}")
    facts = Facts.of(vit, how)
    patches, index = as_patches(facts, images)
    if not len(patches):
        raise InputError("there are no images to calibrate with")
    if not torch.isfinite(patches).all():
        raise InputError("the images to calibrate with hold NaN or infinity")
    with seeded(0, vit.device):  # torchao and torch.export draw from the global generators
        return _calibrated(model, facts, patches, index, batch_size, vit.device)


def _calibrated(model: nn.Module, facts: Facts, patches: Tensor, index: Tensor, batch_size: int, device: torch.device) -> "SimulatedViT":
    prepare, convert, quantizer = _torchao()
    tokens = Tokens(model, fused_attention=not (facts.recipe.attention or facts.recipe.published))
    graph = export(tokens, example(facts, device))
    places = find_places(graph, facts)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's and torchao's about their own deprecations
        prepared = prepare(graph, quantizer(places, facts.recipe))
        for some, cells in batches(patches, index, batch_size, device):
            prepared(some, cells)
        converted = convert(prepared)
    return SimulatedViT(facts, *_read(converted, places, tokens))


def _torchao() -> tuple:
    """prepare_pt2e, convert_pt2e and our quantizer; raises InputError where torchao is missing."""
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        from .ranges import ViTQuantizer
    except ImportError as error:
        raise InputError(f"quantisation needs torchao: pip install torchao ({error})") from error
    return prepare_pt2e, convert_pt2e, ViTQuantizer


class SimulatedLinear(QuantizedLinear):
    """A linear layer in float32 of the values that its codes and those of its input stand for."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.simulated(x), self.codes.float() * self.scales[:, None], self.bias)


class SimulatedViT(QuantizedViT):
    """A quantised ViT in float32, where every quantised tensor takes the values of its codes."""

    KIND, LINEAR = "simulated", SimulatedLinear

    @at_the_door
    def int8(self) -> Int8ViT:
        """The deployable model of the same codes and scales, whose linear layers multiply integers on the CPU; raises InputError where attention's
        GEMMs are quantised too."""
        can_int8(self.facts.recipe)
        return Int8ViT(self.facts, self.tensors(), self.inputs())


def _read(graph: GraphModule, places: Places, tokens: Tokens) -> tuple[dict[str, Tensor], dict[str, tuple[float, int]]]:
    """Tensors and inputs of a QuantizedViT, out of torchao's converted graph, on its device.

    The graph computes linear(dequantize(quantize(x)), dequantize(codes), bias), dequantize(quantize(...)) of what a place makes or reads.
    """
    held: dict[str, Tensor] = graph.state_dict()
    nodes: dict[str, Any] = {node.name: node for node in graph.graph.nodes}
    read = {node.target for node in nodes.values() if node.op == "get_attr"} - {"positions"}
    tensors = {name: tensor.detach() for name, tensor in held.items() if name in read and not name.startswith("_")}  # what is not quantised
    if tokens.positions is not None:
        prefix = len(tokens.prefix)
        tensors |= {"prefix_position": tokens.positions[:prefix].clone(), "position": tokens.positions[prefix:].clone()}
    for name, linear in places.linears.items():
        tensors[f"{name}.codes"], tensors[f"{name}.scales"] = (held[each.target].detach() for each in nodes[linear.name].args[1].args[:2])
    seen = {name: nodes[node.name].args[argument] for name, (node, argument) in places.inputs.items()}
    seen |= {name: next(user for user in nodes[node.name].users if "quantize" in user.name) for name, node in places.outputs.items()}
    return tensors, {name: (float(node.args[1]), int(node.args[2])) for name, node in seen.items()}
