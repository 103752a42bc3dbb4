"""A frozen description of a timm Vision Transformer, read from its modules and proven by its answers.

The model is neither patched nor copied. The description holds its weights, detached unless asked otherwise, and the few facts that the engine needs.
It is compared with the model's own answers (`proof`): what computes the same is supported, whatever its class is called. A model for which the engine
would compute something else is refused with the reason.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..plain import MEANS, STDS
from ..surroundings import neutral, seeded
from .activations import name_of
from .description import Block, Linear, Norm, ViT
from .proof import prove
from .unwrap import find_vit, peel
from .view import View, refuse_torchvision

__all__ = ["Block", "Linear", "Norm", "ViT", "describe", "describe_weights"]

Take = Callable[[Any], Any]  # a parameter as the description holds it, None where it is None


def describe(
    model: nn.Module, *, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None, flip: bool | None = None, frozen: bool = True
) -> ViT:
    """The description of a timm `VisionTransformer` or `VisionTransformerDistilled`, or of any model that computes what such a one does.

    The model may be wrapped: in DataParallel, DistributedDataParallel or torch.compile, in a normalisation of its pixels (which becomes mean and
    std), in a module that does nothing else. mean, std: of the training images per channel, as fractions of white. flip: whether mirror images keep
    their class. None: from the model's `pretrained_cfg`. frozen: detach the weights; False keeps them in the autograd graph, to train a student.

    Raises InputError with the reason for a model that is not supported, and where its own logits, pixel gradients or logits of a subset of the tokens
    are others than the description's: it names the first block that differs.
    """
    return with_statistics(describe_weights(model, flip=flip, frozen=frozen), mean, std)


def with_statistics(vit: ViT, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> ViT:
    """The description with statistics: those given, else the model's own. Raises InputError where there are none, or others than it normalises by."""
    mean = None if mean is None else MEANS("mean", mean)
    std = None if std is None else STDS("std", std)
    if vit.normalises:
        for word, given, own in (("mean", mean, vit.mean), ("std", std, vit.std)):
            if given is not None and (len(given) != len(own) or any(abs(a - b) > 1e-4 for a, b in zip(given, own, strict=True))):
                raise InputError(f"the model normalises its pixels itself, with {word} {own}: leave out {word}={tuple(given)}")
        mean, std = vit.mean, vit.std
    mean, std = statistics(vit.channels, vit.mean or None if mean is None else mean, vit.std or None if std is None else std)
    return replace(vit, mean=mean, std=std)


def describe_weights(model: nn.Module, *, flip: bool | None = None, frozen: bool = True) -> ViT:
    """The same for images that come normalised: mean and std are empty where nothing tells them."""
    refuse_torchvision(peel(model))
    found = find_vit(model)
    cfg = getattr(found.vit, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") or type(found.vit).__name__
    flip = cfg.get("flip", True) if flip is None else flip
    with neutral(grad=not frozen), seeded(0):
        vit = _described(found.vit, name, flip=flip, frozen=frozen)
        vit, front = prove(found, vit, lambda module: _described(module, name, flip=flip, frozen=frozen), frozen=frozen)
    mean, std = (cfg.get("mean"), cfg.get("std")) if front is None else front
    return replace(vit, mean=tuple(mean or ()), std=tuple(std or ()), normalises=front is not None, view=View.of(cfg))


def _described(model: Any, name: str, *, flip: bool, frozen: bool) -> ViT:
    """The description without statistics."""
    try:
        refuse_unsupported(model, name)
        return _read(model, name, flip=flip, frozen=frozen)
    except (AttributeError, TypeError, IndexError, KeyError) as error:
        raise InputError(f"{name} is not supported: it is not built like a timm VisionTransformer ({error})") from error


def _read(model: Any, name: str, *, flip: bool, frozen: bool) -> ViT:
    take: Take = (lambda p: None if p is None else p.detach()) if frozen else (lambda p: p)
    distilled = getattr(model, "dist_token", None) is not None
    registers = getattr(model, "reg_token", None)
    tokens = [model.cls_token, *([model.dist_token] if distilled else []), *([] if registers is None else [registers])]
    prefix = torch.cat([take(token)[0] for token in tokens])
    position = None if model.pos_embed is None else take(model.pos_embed)[0]
    if position is not None and not getattr(model, "no_embed_class", False):
        prefix, position = prefix + position[: len(prefix)], position[len(prefix) :]
    embed = model.patch_embed.proj
    return ViT(
        name=name,
        image_size=tuple(model.patch_embed.img_size),
        patch_size=embed.kernel_size[0],
        channels=embed.in_channels,
        embed=Linear(take(embed.weight).flatten(1), take(embed.bias)),
        prefix=prefix,
        position=position,
        norm_pre=_norm(getattr(model, "norm_pre", None), take),
        blocks=tuple(_block(i, block, take, name) for i, block in enumerate(model.blocks)),
        norm=_norm(model.norm, take),
        pool=model.global_pool,
        fc_norm=None if distilled else _norm(getattr(model, "fc_norm", None), take),
        heads=tuple(_linear(head, take) for head in ([model.head, model.head_dist] if distilled else [model.head])),
        mean=(),
        std=(),
        flip=flip,
    )


def refuse_unsupported(model: Any, name: str) -> None:
    """Raise InputError with the first reason for which no description can say what this model computes."""
    patch_embed, blocks = model.patch_embed, list(model.blocks)
    embed: Any = getattr(patch_embed, "proj", None)
    kernel: Any = getattr(embed, "kernel_size", None)
    reasons: list[tuple[Any, str]] = [
        (
            kernel is None or getattr(embed, "weight", None) is None or getattr(patch_embed, "backbone", None) is not None,
            "its patch embedding is not a single convolution",
        ),
        (model.cls_token is None, "it has no CLS token"),
        (getattr(model, "num_classes", 1) <= 0, "it has no classifier head (num_classes is 0)"),
        (
            model.global_pool not in ("token", "avg") or getattr(model, "attn_pool", None) is not None,
            f"its pooling '{model.global_pool}' is neither 'token' nor 'avg'",
        ),
        (getattr(model, "pool_include_prefix", False), "its pooling averages prefix tokens"),
        (not blocks, "it has no blocks"),
        (
            getattr(model, "dist_token", None) is not None and getattr(model, "reg_token", None) is not None,
            "it has both distillation and register tokens",
        ),
        (getattr(getattr(model, "head", None), "weight", None) is None, f"its classifier head {_kind(model, 'head')} has no weight matrix"),
    ]
    for wrong, reason in reasons:
        if wrong:
            raise InputError(f"{name} is not supported: {reason}")
    height, width = patch_embed.img_size
    patch = kernel[0]
    reasons = [
        (kernel != (patch, patch) or embed.stride != (patch, patch), "its patches are not square and disjoint"),
        (embed.weight.shape[1] != embed.in_channels, "its patch embedding is a convolution in groups"),
        (height % patch or width % patch, f"its image size {height}x{width} is not a multiple of its patch size {patch}"),
    ]
    for wrong, reason in reasons:
        if wrong:
            raise InputError(f"{name} is not supported: {reason}")


def _kind(module: Any, name: str) -> str:
    return type(getattr(module, name, None)).__name__


def _is_norm(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _linear(module: Any, take: Take) -> Linear:
    return Linear(take(module.weight), take(module.bias))


def _norm(module: Any, take: Take) -> Any:
    """A Norm, or None where the module is an identity."""
    if not _is_norm(module):
        return None
    weight = getattr(module, "weight", None)
    if weight is None or not hasattr(module, "eps"):
        raise InputError(f"normalisation {type(module).__name__} is not supported: only LayerNorm with a weight is")
    return Norm(take(weight), take(getattr(module, "bias", None)), module.eps)


def _block(number: int, block: Any, take: Take, name: str) -> Block:
    """A block that holds what a pre-norm block does. Raises InputError with the reason where it does not."""

    def refuse(reason: str) -> InputError:
        return InputError(f"{name} is not supported: block {number}: {reason}")

    if any(getattr(block, part, None) is None for part in ("norm1", "attn", "norm2", "mlp")):
        raise refuse(f"{type(block).__name__} is not the standard pre-norm block")
    attention, mlp = block.attn, block.mlp
    for owner, parts in ((attention, ("qkv", "proj")), (mlp, ("fc1", "fc2"))):
        for part in parts:
            weight = getattr(getattr(owner, part, None), "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim != 2:
                raise refuse(f"{type(owner).__name__} has no linear layer {part} with a weight matrix")
    if getattr(attention, "gate", None) is not None or _is_norm(getattr(attention, "norm", None)):
        raise refuse("its attention output is gated or normalised")
    if not (_is_norm(block.norm1) and _is_norm(block.norm2)):
        raise refuse("it does not normalise before attention and MLP")
    activation = name_of(mlp.act)
    if activation is None:
        raise refuse(f"its activation {type(mlp.act).__name__} is not GELU, tanh GELU or QuickGELU")
    width = attention.proj.weight.shape[1]
    if attention.num_heads < 1 or width % attention.num_heads or len(attention.qkv.weight) != 3 * width:
        raise refuse(f"its {attention.num_heads} heads do not fit weights of {len(attention.qkv.weight)} and {width} rows and columns")
    if mlp.fc1.weight.shape[0] != mlp.fc2.weight.shape[1]:
        raise refuse(f"its MLP is {mlp.fc1.weight.shape[0]} wide at one layer and {mlp.fc2.weight.shape[1]} at the other")
    scales: Any = (getattr(block, "ls1", None), getattr(block, "ls2", None))
    scale1, scale2 = (take(scale.gamma) if _is_norm(scale) else None for scale in scales)
    return Block(
        norm1=_norm(block.norm1, take),
        qkv=_linear(attention.qkv, take),
        q_norm=_norm(getattr(attention, "q_norm", None), take),
        k_norm=_norm(getattr(attention, "k_norm", None), take),
        proj=_linear(attention.proj, take),
        scale1=scale1,
        norm2=_norm(block.norm2, take),
        fc1=_linear(mlp.fc1, take),
        fc2=_linear(mlp.fc2, take),
        scale2=scale2,
        num_heads=attention.num_heads,
        activation=activation,
    )


def statistics(channels: int, mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and std as tuples of `channels` floats; raises InputError where they do not fit the model."""
    for name, values in (("mean", mean), ("std", std)):
        if values is None or len(values) != channels:
            given = "no" if values is None else len(values)
            raise InputError(f"the model has {channels} channels, but {given} values of {name} are known: pass {name}= with {channels} values")
    return MEANS("mean", mean), STDS("std", std)
