"""The Vision Transformer in a model: the model itself, or the only one in what wraps it."""

from typing import Any, NamedTuple

from torch import nn

from ..errors import InputError

# By name, with the attribute of what they wrap: their call is that module's own, and calling them here would meet other processes, or a compiler.
TRANSPARENT = {"DataParallel": "module", "DistributedDataParallel": "module", "AveragedModel": "module", "OptimizedModule": "_orig_mod"}
TRANSPARENT |= {"Accelerated": "model", "DropIn": "model"}  # of smi.engine.drop_in: a frozen copy
PARTS = ("patch_embed", "blocks", "cls_token")  # what timm's Vision Transformers have


class Found(NamedTuple):
    """A ViT and what it was found in."""

    outer: nn.Module  # what answers
    vit: nn.Module
    path: str  # of vit in outer, as an attribute; empty where they are one


def peel(model: nn.Module) -> nn.Module:
    """The model within DataParallel, DistributedDataParallel, AveragedModel and torch.compile."""
    while True:
        attribute = next((TRANSPARENT[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in TRANSPARENT), None)
        if attribute is None or not isinstance(inner := getattr(model, attribute, None), nn.Module):
            return model
        model = inner


def find_vit(model: nn.Module) -> Found:
    """The one ViT in a model. Raises InputError where there is none or more than one, with what to pass instead."""
    if not isinstance(model, nn.Module):
        raise InputError(f"a model must be a torch.nn.Module, got {type(model).__name__}")
    outer = peel(model)
    if _is_vit(outer):
        return Found(outer, outer, "")
    found = [(path, module) for path, module in outer.named_modules() if _is_vit(module)]
    found = [(path, module) for path, module in found if not any(path.startswith(f"{other}.") for other, _ in found)]
    name = type(outer).__name__
    if not found:
        raise InputError(f"{name} is not supported: pass a timm VisionTransformer or distilled DeiT with a CLS token")
    if len(found) > 1:
        raise InputError(f"{name} holds {len(found)} Vision Transformers: pass one of them, {' or '.join(attribute(path) for path, _ in found)}")
    path, vit = found[0]
    return Found(outer, vit, path)


def holds_vit(model: nn.Module) -> bool:
    """Whether there is exactly one ViT in a model."""
    try:
        return bool(find_vit(model))
    except InputError:
        return False


def unwrapped(model: nn.Module) -> Any:
    """The ViT itself where a model holds one, else the model without its transparent wrappers."""
    try:
        return find_vit(model).vit
    except InputError:
        return peel(model)


def attribute(path: str) -> str:
    """How Python writes the way to a module: model.backbone, model[1]."""
    return "model" + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in path.split(".") if part)


def _is_vit(module: nn.Module) -> bool:
    return all(hasattr(module, part) for part in PARTS)
