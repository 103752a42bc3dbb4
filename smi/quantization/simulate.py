"""Post-training quantisation, calibrated with synthetic or real images, on torchao's PT2E.

export (patches, index) -> logits  ->  observers placed by torchao  ->  a forward on the retained patches  ->  integers and their scales
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..errors import InputError
from ..models.unwrap import unwrapped
from ..surroundings import at_the_door, seeded
from .export import Tokens, describe_for, example, export, export_program
from .files import write
from .int8 import Int8ViT, can_int8
from .model import Facts, Images, QuantizedViT, as_patches, batches
from .recipe import Recipe


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
    batch_size: int = 32,
) -> "SimulatedViT":
    """A quantised copy of a timm ViT, calibrated with `images`.

    images: SparseImages, of which only the retained patches are fed; normalised pixels [M, C, H, W]; or (patches [M, n, C, p, p], index [M, n]).
    weight_bits, activation_bits: 2 to 8; weights per output channel and symmetric, inputs of the linear layers per tensor and asymmetric.
    ranges: of the activations: "minmax" (as published), "percentile" (from the (100 - percentile)-th to the percentile-th) or "mse" (least squared
    error). weight_ranges: "minmax" or "mse".
    attention: quantise both operands of attention's two GEMMs as well.
    batch_size: images at a time.

    Returns a simulation in float32; where both widths are 8, its `int8()` is the deployable model. Raises InputError for what does not fit the model
    and where torchao is missing, RunError with the module that cannot be exported.
    """
    recipe = Recipe(weight_bits, activation_bits, ranges, percentile, weight_ranges, attention)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be a whole number of at least 1, got {batch_size}")
    vit, model = describe_for(model, images), unwrapped(model)
    if vit.embed.weight.dtype != torch.float32:
        raise InputError(f"a model to quantise must be float32, this one is {str(vit.embed.weight.dtype).removeprefix('torch.')}")
    facts = Facts.of(vit, recipe)
    patches, index = as_patches(facts, images)
    if not len(patches):
        raise InputError("there are no images to calibrate with")
    if not torch.isfinite(patches).all():
        raise InputError("the images to calibrate with hold NaN or infinity")
    with seeded(0, vit.device):  # torchao and torch.export draw from the global generators
        return _calibrated(model, facts, patches, index, batch_size, vit.device)


def _calibrated(model: nn.Module, facts: Facts, patches: Tensor, index: Tensor, batch_size: int, device: torch.device) -> "SimulatedViT":
    prepare, convert, quantizer = _torchao()
    graph = export(Tokens(model, fused_attention=not facts.recipe.attention), example(facts, device))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's and torchao's about their own deprecations
        prepared = prepare(graph, quantizer(facts.recipe))
        for some, cells in batches(patches, index, batch_size, device):
            prepared(some, cells)
        converted = convert(prepared)
    _forget_unused(converted)
    return SimulatedViT(facts, converted)


def _torchao() -> tuple:
    """prepare_pt2e, convert_pt2e and our quantizer; raises InputError where torchao is missing."""
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        from .ranges import ViTQuantizer
    except ImportError as error:
        raise InputError(f"quantisation needs torchao: pip install torchao ({error})") from error
    return prepare_pt2e, convert_pt2e, ViTQuantizer


class SimulatedViT(QuantizedViT):
    """A quantised ViT in float32: torchao's converted graph, where every quantised tensor takes the values of its codes."""

    def __init__(self, facts: Facts, graph: GraphModule) -> None:
        super().__init__(facts)
        self.graph = graph

    def logits(self, patches: Tensor, index: Tensor) -> Tensor:
        device = next(self.graph.buffers()).device
        with torch.no_grad():
            return self.graph(patches.to(device, torch.float32), index.to(device))

    def int8(self) -> Int8ViT:
        """The deployable model of the same codes and scales, whose linear layers multiply integers on the CPU; raises InputError where it is not
        W8/A8, or attention's GEMMs are quantised too."""
        can_int8(self.facts.recipe)
        tensors, inputs = _tensors(self.graph), {}
        for name, node in zip(self.facts.linears(), _linears(self.graph), strict=True):
            inputs[name] = _codes(self.graph, node, name, tensors)
        return Int8ViT(self.facts, tensors, inputs)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write graph (torch.export's .pt2) and facts to a folder; `load_quantized` reads it."""
        device = next(self.graph.buffers()).device
        program = export_program(self.graph, example(self.facts, device))
        return write(folder, "simulated", self.facts, lambda path: _save(program, path), force=force)


def _save(program: torch.export.ExportedProgram, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file)


def _linears(graph: GraphModule) -> list[Node]:
    """The linear layers of a graph, in the order in which they run."""
    return [node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]


def _tensors(graph: GraphModule) -> dict[str, Tensor]:
    """What the graph reads by the model's own names: everything that is not quantised."""
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    return {name: tensor.detach().cpu() for name, tensor in graph.state_dict().items() if name in read and not name.startswith("_")}


def _codes(graph: GraphModule, node: Any, name: str, tensors: dict[str, Tensor]) -> tuple[float, int]:
    """Put codes and scales of linear(dequantize(quantize(x)), dequantize(codes), bias) into `tensors`; returns scale and zero point of x."""
    x, weight = node.args[:2]
    held = graph.state_dict()
    tensors[f"{name}.codes"], tensors[f"{name}.scales"] = (held[argument.target].detach().cpu() for argument in weight.args[:2])
    scale, zero = x.args[1:3]
    return float(scale), int(zero)


def _forget_unused(graph: GraphModule) -> None:
    """Drop the float weights, which no node reads any more."""
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name, _ in list(graph.named_parameters()):
        if name not in read:
            owner, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(owner), leaf)
