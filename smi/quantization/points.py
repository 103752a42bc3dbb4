"""Where the activations of a recipe lie in the exported graph of `export.Tokens`: the names of `Facts.activations`, and the nodes."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..errors import InputError
from .model import Facts

aten = torch.ops.aten


@dataclass(frozen=True)
class Places:
    """Nodes by the names of what is quantised. inputs: the node that reads an activation, and which argument it is. outputs: the node that makes
    one."""

    linears: dict[str, Node]
    inputs: dict[str, tuple[Node, int]] = field(default_factory=dict)
    outputs: dict[str, Node] = field(default_factory=dict)


def find_places(graph: GraphModule, facts: Facts) -> Places:
    """The places of all that the recipe quantises; raises InputError for a block that is not made of two residual sums and two GEMMs of attention."""
    nodes = list(graph.graph.nodes)
    linears = dict(zip(facts.linears(), _calls(nodes, aten.linear.default), strict=True))
    found = Places(linears, {name: (node, 0) for name, node in linears.items() if name in facts.activations()})
    operands = [(node, argument) for node in _calls(nodes, aten.matmul.default) for argument in (0, 1)]
    found.inputs.update(zip(facts.operands(), operands if facts.recipe.operands else (), strict=True))
    if facts.recipe.published:
        _add_points(found, nodes, facts)
    return found


def _add_points(found: Places, nodes: list[Node], facts: Facts) -> None:
    """The points of the published recipe beside linear layers' inputs, by the modules in which the nodes lie."""
    outputs = found.outputs
    outputs["tokens"] = next(node for node in _calls(nodes, aten.cat.default) if found.linears["embed"] in node.args[0])
    if facts.architecture["position"]:
        found.inputs["positions"] = _calls(nodes, aten.embedding.default)[0], 0
        outputs["embedded"] = next(node for node in outputs["tokens"].users if node.target is aten.add.Tensor)
    if "norm_pre" in facts.architecture["eps"]:
        outputs["norm_pre_output"] = next(node for node in _calls(nodes, aten.layer_norm.default) if _module(node) == "norm_pre")
    for i in range(facts.architecture["depth"]):
        block = f"blocks.{i}"
        sums = [node for node in _calls(nodes, aten.add.Tensor) if _module(node) == block]
        products = [node for node in _calls(nodes, aten.matmul.default) if _module(node).startswith(f"{block}.")]
        if len(sums) != 2 or len(products) != 2:
            raise InputError(
                f"{facts.name} has no published recipe: {block} must hold two residual sums and two GEMMs of attention, "
                f"its graph holds {len(sums)} and {len(products)}"
            )
        outputs.update({f"{block}.attn.scores": products[0], f"{block}.attn_sum": sums[0], f"{block}.mlp_sum": sums[1]})
        outputs.update({f"{block}.{layer}_output": found.linears[f"{block}.{layer}"] for layer in ("attn.qkv", "attn.proj", "mlp.fc2")})
    outputs.update({f"head_outputs.{i}": found.linears[f"heads.{i}"] for i in range(facts.architecture["heads"])})


def _calls(nodes: list[Any], operation: object) -> list[Any]:
    """The calls of an operation, in the order in which they run."""
    return [node for node in nodes if node.target is operation]


def _module(node: Node) -> str:
    """Dotted name of the innermost module in which a node lies."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""
