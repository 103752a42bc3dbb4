"""ONNX files of ViTs, float or quantised, for runtimes other than ours."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..files import output_folder, replace_file
from ..models.description import ViT
from ..models.unwrap import attribute, find_vit
from ..models.vit import describe_weights
from ..plain import path as path_of
from ..surroundings import at_the_door
from .model import Facts
from .network import QuantizedViT
from .onnx_graph import Network, needed
from .recipe import Recipe

FILE = "model.onnx"
LARGEST = 2**31 - 2**20  # bytes of weights: what protobuf holds, less a megabyte for nodes and names


@at_the_door
def save_onnx(model: nn.Module, folder: str | Path, *, force: bool = False) -> Path:
    """Write a ViT as model.onnx (opset 20) to a folder and return the file's path.

    model: what `quantize` or `int8()` gave, of any recipe and width, or a supported float ViT, in float32 whatever its dtype. The graph takes
    `images`, normalised pixels float32 [batch, C, H, W] with all patches, any batch, and gives `logits` float32 [batch, classes]. Weights of a
    quantised model are int8 codes with a scale per output channel, rounded activations pass QuantizeLinear and DequantizeLinear.

    Raises InputError where onnx is missing, where the model is none of these, normalises its pixels itself or has two gigabytes of weights or more,
    and where the folder is not empty and not `force`.
    """
    folder = path_of("folder", folder)
    needed()
    facts, tensors, inputs, about = _quantized(model) if isinstance(model, QuantizedViT) else _float(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > LARGEST:
        raise InputError(f"{facts.name} has {size / 1e9:.1f} GB of weights: one ONNX file holds at most 2 GB")
    data = Network(facts, tensors, inputs).model({"name": facts.name, **about}).SerializeToString()
    path = output_folder(folder, force) / FILE
    replace_file(path, lambda temporary: temporary.write_bytes(data))
    return path


def _quantized(model: QuantizedViT) -> tuple[Facts, dict[str, Tensor], dict[str, tuple[float, int]], dict[str, str]]:
    return model.facts, model.tensors(), model.inputs(), {"recipe": model.facts.recipe.name, "widths": str(model.facts.recipe)}


def _float(model: nn.Module) -> tuple[Facts, dict[str, Tensor], dict[str, tuple[float, int]], dict[str, str]]:
    vit = describe_weights(model)
    if vit.normalises:
        raise InputError(f"the model normalises its pixels itself: pass {attribute(find_vit(model).path)}, whose images come normalised")
    facts = Facts.of(vit, Recipe())
    each = {"num_heads": [block.num_heads for block in vit.blocks], "activation": [block.activation for block in vit.blocks]}
    about = {name: repr(values) for name, values in (("mean", vit.mean), ("std", vit.std)) if values}
    return replace(facts, architecture={**facts.architecture, **each}), _tensors(vit), {}, about


def _tensors(vit: ViT) -> dict[str, Tensor]:
    """The weights by the names that a quantised model has for them."""
    parts: dict[str, Any] = {"embed": vit.embed, "norm_pre": vit.norm_pre, "norm": vit.norm, "fc_norm": vit.fc_norm}
    found: dict[str, Tensor | None] = {"prefix": vit.prefix, "position": vit.position}
    for i, block in enumerate(vit.blocks):
        of_attention = {name: getattr(block, name) for name in ("qkv", "q_norm", "k_norm", "proj")}
        of_block = {"norm1": block.norm1, "norm2": block.norm2, "mlp.fc1": block.fc1, "mlp.fc2": block.fc2}
        parts |= {f"blocks.{i}.{name}": part for name, part in of_block.items()}
        parts |= {f"blocks.{i}.attn.{name}": part for name, part in of_attention.items()}
        found |= {f"blocks.{i}.ls1.gamma": block.scale1, f"blocks.{i}.ls2.gamma": block.scale2}
    parts |= {f"heads.{i}": head for i, head in enumerate(vit.heads)}
    found |= {f"{name}.{field}": getattr(part, field) for name, part in parts.items() if part is not None for field in ("weight", "bias")}
    return {name: tensor.detach().cpu().float() for name, tensor in found.items() if tensor is not None}
