"""A timm ViT as an exported graph of (patches, index), with any number of images and of tokens: sparse to calibrate, dense to run."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, RunError
from ..models.unwrap import attribute, find_vit
from ..models.vit import ViT, describe_weights
from .model import Facts

EXAMPLE = (2, 3)  # images and patches to export with: neither is 0 or 1, which torch.export would take for constants


def describe_for(model: nn.Module, images: Any = None) -> ViT:
    """The description of a model whose images come normalised: its own statistics play no part, and may be unknown."""
    vit = describe_weights(model)
    if len({(block.num_heads, block.activation) for block in vit.blocks}) > 1:
        raise InputError(f"{vit.name} cannot be quantised: its blocks differ in number of heads or activation")
    if vit.normalises and isinstance(images, Tensor):
        raise InputError(f"the model normalises its pixels itself: pass {attribute(find_vit(model).path)} and images normalised for it")
    return vit


class Tokens(nn.Module):
    """Logits of a timm ViT on patches [B, n, C, p, p] that lie at cells index [B, n]; its own modules, copied."""

    prefix: Tensor  # [P, d], without position embeddings
    positions: Tensor | None  # [P + N, d]

    def __init__(self, model: nn.Module, fused_attention: bool = True):
        super().__init__()
        vit = describe_for(model)
        trunk: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.embed = nn.Linear(vit.embed.weight.shape[1], vit.embed_dim, bias=vit.embed.bias is not None, device=vit.device)
        with torch.no_grad():
            self.embed.weight.copy_(vit.embed.weight)
            if vit.embed.bias is not None:
                self.embed.bias.copy_(vit.embed.bias)
        self.embed.requires_grad_(False)
        prefix, positions = _raw_tokens(trunk, vit)
        self.register_buffer("prefix", prefix)
        self.register_buffer("positions", positions)
        self.norm_pre, self.blocks, self.norm = trunk.norm_pre, trunk.blocks, trunk.norm
        self.fc_norm = nn.Identity() if vit.fc_norm is None else trunk.fc_norm
        self.heads = nn.ModuleList([trunk.head, *([trunk.head_dist] if len(vit.heads) > 1 else [])])
        self.pool = vit.pool
        for block in self.blocks:
            block.attn.fused_attn = fused_attention

    def forward(self, patches: Tensor, index: Tensor) -> Tensor:
        x = self.embed(patches.flatten(2))
        x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)
        if self.positions is not None:
            first = torch.arange(len(self.prefix), device=index.device).expand(index.shape[0], -1)
            x = x + F.embedding(torch.cat([first, index + len(self.prefix)], dim=1), self.positions)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        read = [x[:, len(self.prefix) :].mean(1)] if self.pool == "avg" else [x[:, i] for i in range(len(self.heads))]
        logits = [head(self.fc_norm(token)) for token, head in zip(read, self.heads, strict=True)]
        return torch.stack(logits).mean(0) if len(logits) > 1 else logits[0]


def _raw_tokens(trunk: Any, vit: ViT) -> tuple[Tensor, Tensor | None]:
    """Prefix tokens [P, d] without position embeddings, and the position embeddings [P + N, d] of prefix tokens and cells; copies."""
    tokens = [getattr(trunk, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    prefix = torch.cat([token.detach()[0] for token in tokens if token is not None])
    if vit.position is None:
        return prefix, None
    position = trunk.pos_embed.detach()[0]
    if len(position) == len(vit.position):  # the prefix tokens have none
        position = torch.cat([torch.zeros_like(prefix), position])
    return prefix, position.clone()


def example(facts: Facts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Patches and their cells to export with."""
    shape = (*EXAMPLE, facts.channels, facts.patch_size, facts.patch_size)
    return torch.zeros(shape, device=device), torch.zeros(EXAMPLE, dtype=torch.int64, device=device)


def export(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> torch.fx.GraphModule:
    """The graph of a module of (patches, index), for any number of images and of patches; raises RunError with what cannot be exported."""
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=(any_size, any_size)).module(check_guards=False)
    except Exception as error:  # torch.export fails in many ways; what a user can act on is where
        culprit = _culprit(module, inputs) or type(module).__name__
        raise RunError(f"{culprit} cannot be exported ({type(error).__name__}: {_first_line(error)})") from error


def _culprit(module: nn.Module, args: tuple) -> str | None:
    """Dotted name of the innermost module that cannot be exported by itself."""
    name = None
    while True:
        seen = _inputs_of_children(module, args)
        failing = next((child for child, (part, inputs) in seen.items() if not _exports(part, inputs)), None)
        if failing is None:
            return name
        name = failing if name is None else f"{name}.{failing}"
        module, args = seen[failing]


def _inputs_of_children(module: nn.Module, args: tuple) -> dict[str, tuple[nn.Module, tuple]]:
    """What each child module is called with, as far as the module runs at all; a child that is a list stands for its members."""
    children: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child):
            children.update({f"{name}.{i}": part for i, part in enumerate(child)})
        else:
            children[name] = child
    seen: dict[str, tuple[nn.Module, tuple]] = {}
    hooks = [
        child.register_forward_pre_hook(lambda child, inputs, name=name: seen.setdefault(name, (child, inputs)) and None)
        for name, child in children.items()
    ]
    try:
        with torch.no_grad():
            module(*args)
    except Exception:  # it does not even run: the last child that was called is looked at like the others
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _exports(module: nn.Module, args: tuple) -> bool:
    any_batch = tuple({0: torch.export.Dim.DYNAMIC} if isinstance(arg, Tensor) and arg.ndim else None for arg in args)
    try:
        with torch.no_grad():
            torch.export.export(module, args, dynamic_shapes={"args": any_batch} if _takes_star_args(module) else any_batch)
        return True
    except Exception:
        return False


def _takes_star_args(module: nn.Module) -> bool:
    from inspect import Parameter, signature

    return any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in signature(module.forward).parameters.values())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no reason given"
