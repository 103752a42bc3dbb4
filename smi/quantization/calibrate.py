"""Calibration: torchao's observers in the exported graph of a model, and what they saw."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .export import Tokens, example, export
from .model import Facts, Images, as_patches, batches, check_images
from .points import find_places
from .reparametrize import reparametrize

Range = tuple[float, float]


class Calibration:
    """The graph of a model with observers of all that the recipe quantises: it sees images, then gives the tensors of a quantised ViT."""

    def __init__(self, model: nn.Module, facts: Facts, batch_size: int, first: Sequence[Images] = ()):
        """model: a timm ViT without wrappers. first: images by which LayerNorm channels are reparametrised, where the recipe says so. Raises
        InputError where torchao is missing, RunError with the module that cannot be exported."""
        prepare, self._convert, quantizer = _torchao()
        self.facts, self.batch_size, self.images = facts, batch_size, 0
        self._tokens = Tokens(model, fused_attention=not (facts.recipe.operands or facts.recipe.published))
        self._device = self._tokens.prefix.device
        if facts.recipe.reparametrized:
            reparametrize(self._tokens, [some for images in first for some in self._batches(images)])
        graph = export(self._tokens, example(facts, self._device))
        self._places = find_places(graph, facts)
        with _quiet():
            self._graph: Any = prepare(graph, quantizer(self._places, facts.recipe))

    def see(self, images: Images) -> None:
        """A forward pass over images, sparse ones with their retained patches; raises InputError for none, NaN or infinity."""
        with _quiet():
            for some, cells in self._batches(images):
                self._graph(some, cells)
                self.images += len(some)

    def _batches(self, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(*check_images(*as_patches(self.facts, images)), self.batch_size, self._device)

    def ranges(self) -> dict[str, Range]:
        """The least and the greatest value of every quantised activation so far."""
        nodes = {node.name: node for node in self._graph.graph.nodes}
        seen: dict[str, Any] = {name: nodes[node.name].args[argument] for name, (node, argument) in self._places.inputs.items()}
        seen |= {name: next(iter(nodes[node.name].users)) for name, node in self._places.outputs.items()}
        observers = {name: self._graph.get_submodule(node.target) for name, node in seen.items()}
        return {name: (observer.min_val.item(), observer.max_val.item()) for name, observer in observers.items()}

    def result(self) -> tuple[dict[str, Tensor], dict[str, tuple[float, int]]]:
        """Tensors and inputs of a QuantizedViT, out of torchao's converted graph, on its device; the observers are gone then.

        The graph computes linear(dequantize(quantize(x)), dequantize(codes), bias), dequantize(quantize(...)) of what a place makes or reads.
        """
        with _quiet():
            graph = self._convert(self._graph)
        held: dict[str, Tensor] = graph.state_dict()
        nodes: dict[str, Any] = {node.name: node for node in graph.graph.nodes}
        read = {node.target for node in nodes.values() if node.op == "get_attr"} - {"positions"}
        tensors = {name: tensor.detach() for name, tensor in held.items() if name in read and not name.startswith("_")}  # what is not quantised
        if self._tokens.positions is not None:
            prefix = len(self._tokens.prefix)
            mine, cells = self._tokens.positions[:prefix], self._tokens.positions[prefix:]
            tensors |= {"prefix_position": mine.clone(), "position": cells.clone()}
        for name, linear in self._places.linears.items():
            tensors[f"{name}.codes"], tensors[f"{name}.scales"] = (held[each.target].detach() for each in nodes[linear.name].args[1].args[:2])
        seen = {name: nodes[node.name].args[argument] for name, (node, argument) in self._places.inputs.items()}
        seen |= {name: next(user for user in nodes[node.name].users if "quantize" in user.name) for name, node in self._places.outputs.items()}
        return tensors, {name: (float(node.args[1]), int(node.args[2])) for name, node in seen.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without gradients, and without the warnings of torch and torchao about their own deprecations."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def _torchao() -> tuple:
    """prepare_pt2e, convert_pt2e and our quantizer; raises InputError where torchao is missing."""
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        from .ranges import ViTQuantizer
    except ImportError as error:
        raise InputError(f"quantisation needs torchao: pip install torchao ({error})") from error
    return prepare_pt2e, convert_pt2e, ViTQuantizer
