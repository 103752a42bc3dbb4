"""The proof that a description computes what its model computes: both are asked, and their answers compared.

Dense: logits and pixel gradients of one of two random images, and where the weights will be trained their gradients too. Sparse: from the tokens of
a few patches on, the model's own blocks one after another, and in each its attention and its MLP, which a small layer scale would hide. Answers are
compared in the model's dtype; where rounding might explain a difference, again in a wider one. A model is proven once, and again when its modules,
their attributes or hooks are others than they were; one with hooks or modules of the user's own in every public call.
"""

import copy
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine import reference
from ..errors import InputError
from ..images.patches import to_patches
from ..surroundings import evaluating, memory_of_this_call, neutral, seeded, uncompiled
from .description import Block, ViT
from .unwrap import Found, attribute

IMAGES = 2
FEW = 16  # every sixteenth patch takes part in the sparse comparison
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # ||ours - theirs|| / ||theirs||
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
PLAIN = (int, float, str, type(None))
KNOWN = ("torch", "timm")  # whose modules do what they are described to do, as long as nobody hooks into them


class Front(NamedTuple):
    """What a model does to its pixels before its ViT: (x - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


_proven: "weakref.WeakKeyDictionary[nn.Module, dict]" = weakref.WeakKeyDictionary()


class Difference(NamedTuple):
    """Why a model is refused. certain: rounding cannot be the reason."""

    text: str
    certain: bool = False


def prove(found: Found, vit: ViT, read: Callable[[nn.Module], ViT], *, frozen: bool) -> tuple[ViT, Front | None]:
    """Compare the description of `found.vit` with what `found.outer` answers; the description, and what the model does to its pixels first.

    read: the description of a ViT, with weights as they are then. frozen: the weights' gradients do not matter. Raises InputError where the answers
    differ, with the first block that does. A model without numbers (on the device meta) is judged by its classes.
    """
    if vit.device.type == "meta" or "FakeTensor" in type(vit.embed.weight).__name__:
        refuse_by_class(found.vit, vit.name)
        return vit, None
    state = _fingerprint(found.outer)
    memory = _proven if state is not None else memory_of_this_call()
    key = (frozen, state)
    if memory is not None and key in memory.get(found.outer, {}):
        return vit, memory[found.outer][key]
    with neutral(), seeded(0, vit.device), evaluating(found.outer), uncompiled():
        front = _proof(found, vit, read, frozen)
    if memory is not None:
        memory.setdefault(found.outer, {})[key] = front
    return read(found.vit), front  # with the weights that the model's own pass may have made


def _fingerprint(model: nn.Module) -> int | None:
    """What decides the computation beside the weights; None where code of the user's own takes part, of which nothing can be remembered."""
    hooks = sys.modules["torch.nn.modules.module"]
    if any(getattr(hooks, name) for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")):
        return None
    parts: list[Any] = []
    for path, module in model.named_modules():
        kind, own = type(module), module.__dict__
        if kind.__module__.split(".")[0] not in KNOWN or "forward" in own or "parametrizations" in module._modules:
            return None
        if any(own[hooks] for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")):
            return None
        plain = tuple((name, value) for name, value in own.items() if name != "training" and isinstance(value, PLAIN))
        parts.append((path, id(module), id(kind), id(kind.forward), plain))
    return hash(tuple(parts))


def _proof(found: Found, vit: ViT, read: Callable[[nn.Module], ViT], frozen: bool) -> Front | None:
    """`prove`, asked for the first time."""
    if any(weight.is_inference() for weight in (*found.outer.parameters(), *found.outer.buffers())):
        found = _copied(found, vit.embed.weight.dtype)  # inference tensors cannot be differentiated through
    while True:
        answer = _ask(found, vit, frozen)
        if not isinstance(answer, Difference):
            vit = read(found.vit)  # the model's own pass may have made its weights, as weight_norm does
            answer = _differs(answer, vit, frozen) or sparse_difference(found.vit, vit, max(1, vit.num_patches // FEW)) or answer
        if isinstance(answer, Answer):
            return answer.front
        dtype = vit.embed.weight.dtype
        if answer.certain or dtype not in WIDER:
            raise InputError(f"{vit.name} is not supported: {_explained(answer, found, vit)}")
        try:
            found = _copied(found, WIDER[dtype])
        except Exception:  # weights that are results of operations, locks, files: no second opinion
            raise InputError(f"{vit.name} is not supported: {_explained(answer, found, vit)}") from None
        vit = read(found.vit)


def _copied(found: Found, dtype: torch.dtype) -> Found:
    outer = copy.deepcopy(found.outer).to(dtype)
    return Found(outer, outer.get_submodule(found.path), found.path)


class Answer(NamedTuple):
    """What a model says to random images."""

    images: Tensor  # [2, C, H, W], as the model takes them
    front: Front | None
    pull: Tensor  # [1, classes], the gradient of the first image's logits
    logits: Tensor  # [2, classes]
    grads: dict[nn.Parameter | None, Tensor | None]  # of the images (None) and, where they will be trained, of its weights


def _ask(found: Found, vit: ViT, frozen: bool) -> Answer | Difference:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, vit.channels, *vit.image_size, generator=draw).to(vit.device, vit.embed.weight.dtype).requires_grad_()
    inputs: list[Any] = []
    watch = found.outer is not found.vit
    hook = found.vit.register_forward_pre_hook(_keep_input(inputs), prepend=True, with_kwargs=True) if watch else None
    try:
        logits = found.outer(images)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a module of anybody's
        return Difference(f"it cannot be asked for logits of images {list(images.shape[1:])} ({_first_line(error)}){_instead(found)}", True)
    finally:
        if hook is not None:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.shape != (IMAGES, vit.num_classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        return Difference(f"its answer must be logits [{IMAGES}, {vit.num_classes}], got {got}{_instead(found)}", True)
    if not torch.isfinite(logits).all():
        refuse_nan(found.outer)
        return Difference("its logits of random images are NaN or infinite")
    front = _front(images.detach(), inputs[0]) if inputs else None
    if isinstance(front, Difference):
        return Difference(front.text + _instead(found), True)
    if not logits.requires_grad:
        return Difference("its logits have no gradient in the pixels", True)
    pull = torch.randn(1, vit.num_classes, generator=draw).to(logits)
    weights = [] if frozen else [weight for weight in found.outer.parameters() if weight.requires_grad]
    grads = torch.autograd.grad(logits[:1], [images, *weights], pull, allow_unused=True)
    return Answer(images, front, pull, logits.detach(), dict(zip([None, *weights], grads, strict=True)))


def _keep_input(inputs: list[Any]) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.extend(value.detach() for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    return keep


def _front(x: Tensor, z: Tensor) -> Front | Difference | None:
    """mean and std of z = (x - mean) / std per channel, None where z is x."""
    if z.shape != x.shape:
        return Difference(f"it gives its ViT images {list(z.shape[1:])} for {list(x.shape[1:])}")
    if torch.equal(x, z):
        return None
    wide, seen = (each.double().transpose(0, 1).flatten(1) for each in (x, z))
    centred = wide - wide.mean(1, keepdim=True)
    slope = (centred * seen).sum(1) / centred.square().sum(1)
    offset = seen.mean(1) - slope * wide.mean(1)
    if not _error(slope[:, None] * wide + offset[:, None], seen) <= CLOSE[x.dtype] or not (slope > 0).all():
        return Difference("it does more to its images than to normalise each channel")
    mean, std = ([float(f"{value:.6g}") for value in values.tolist()] for values in ((-offset / slope).round(decimals=6), 1 / slope))
    return Front(tuple(mean), tuple(std))


def normalises(model: nn.Module, channels: int) -> bool:
    """Whether a model of any kind begins with a module that normalises each channel, as in nn.Sequential(Normalize(mean, std), network)."""
    if isinstance(model, nn.Sequential) and len(model) > 1:
        x = torch.randn(IMAGES, channels, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        try:
            with torch.no_grad(), evaluating(model), seeded(0):
                z = model[0](x.to(next((tensor.device for tensor in model[0].buffers()), "cpu"))).cpu()
            return isinstance(_front(x, z), Front)
        except Exception:  # a layer, of a network that is one sequence
            return False
    return False


def _differs(answer: Answer, vit: ViT, frozen: bool) -> Difference | None:
    """Where the description answers the first image otherwise, alone: what a model says of it does not depend on the second."""
    pixels = images = answer.images[:1].detach().requires_grad_()
    if answer.front is not None:
        mean, std = (torch.tensor(values).to(images).view(-1, 1, 1) for values in answer.front)
        pixels = (images - mean) / std
    index = torch.arange(vit.num_patches, device=vit.device)[None]
    logits = reference.forward_patches(vit, to_patches(pixels, vit.patch_size), index, _attend)
    if not _error(logits.detach(), answer.logits[:1]) <= CLOSE[logits.dtype]:
        return Difference("its logits are others than its weights give")
    weights = [weight for weight in answer.grads if weight is not None]
    grads = torch.autograd.grad(logits, [images, *weights], answer.pull.to(logits), allow_unused=True)
    theirs = answer.grads[None]
    if theirs is None or not _error(torch.cat([grads[0], torch.zeros_like(grads[0])]), theirs) <= CLOSE[logits.dtype]:
        return Difference("its pixel gradients are others than its weights give")
    pairs = [(ours, answer.grads[weight]) for ours, weight in zip(grads[1:], weights, strict=True)]
    if any(ours is None and theirs is not None and theirs.any() for ours, theirs in pairs):
        return Difference("it has weights beside those of a Vision Transformer, which would not be trained", True)
    both = [(ours.flatten(), theirs.flatten()) for ours, theirs in pairs if ours is not None and theirs is not None]
    if both and not _error(*(torch.cat(part) for part in zip(*both, strict=True))) <= CLOSE[logits.dtype]:
        return Difference("the gradients of its weights are others than those of a Vision Transformer")
    return None


@torch.no_grad()
def sparse_difference(model: Any, vit: ViT, count: int) -> Difference | None:
    """Where the model's own modules answer otherwise than the description from the tokens of `count` random patches on."""
    draw = torch.Generator().manual_seed(1)
    index = torch.rand(IMAGES, vit.num_patches, generator=draw).argsort(1)[:, :count].to(vit.device)
    patches = torch.randn(IMAGES, count, vit.embed.weight.shape[1], generator=draw).to(vit.embed.weight)
    tokens = F.linear(patches, vit.embed.weight, vit.embed.bias)
    if vit.position is not None:
        tokens = tokens + vit.position[index]
    x = torch.cat([vit.prefix.expand(IMAGES, -1, -1), tokens], dim=1)
    for i, (module, block) in enumerate(zip(model.blocks, vit.blocks, strict=True)):
        if i == 0 and vit.norm_pre is not None:
            x = reference._normalise(x, vit.norm_pre)
        try:
            parts = _parts(module, block, x)
        except Exception as error:
            return Difference(f"block {i} cannot be asked for {x.shape[1]} tokens ({_first_line(error)})", True)
        for what, mine, own in parts:
            if not isinstance(own, Tensor) or own.shape != mine.shape or not _error(mine, own) <= CLOSE[mine.dtype]:
                return Difference(f"block {i} ({what}) answers otherwise than its weights say: a hook, a forward of its own, other arithmetic")
        x = parts[-1][2]
    head = getattr(model, "forward_head", None)
    if head is None:
        return None
    mine, own = reference._classify(vit, reference._normalise(x, vit.norm)), head(model.norm(x))
    if not isinstance(own, Tensor) or own.shape != mine.shape or not _error(mine, own) <= CLOSE[mine.dtype]:
        return Difference("its norm and head answer otherwise than their weights say")
    return None


def _parts(module: Any, block: Block, x: Tensor) -> list[tuple[str, Tensor, Any]]:
    """What attention and MLP of a block add before the layer scale, and what the block makes of x: by the description, by the module."""
    attended = _attend(reference._qkv(x, block))
    middle = reference.linear_residual(attended, block.proj.weight, block.proj.bias, x, block.scale1)
    hidden = reference.linear_gelu(reference._normalise(middle, block.norm2), block.fc1.weight, block.fc1.bias, block.activation)
    return [
        (f"its {type(module.attn).__name__}", reference._linear(attended, block.proj), module.attn(module.norm1(x))),
        (f"its {type(module.mlp).__name__}", reference._linear(hidden, block.fc2), module.mlp(module.norm2(middle))),
        (type(module).__name__, reference.linear_residual(hidden, block.fc2.weight, block.fc2.bias, middle, block.scale2), module(x)),
    ]


def _explained(difference: Difference, found: Found, vit: ViT) -> str:
    """With the first block that differs, where one does, and what to pass instead where what is around the ViT differs."""
    if difference.certain or difference.text.startswith("block"):
        return difference.text
    first = sparse_difference(found.vit, vit, vit.num_patches)
    if first is not None:
        return first.text
    return difference.text + (_instead(found) or ", though its blocks and its head answer as they should: what is around them differs")


def _instead(found: Found) -> str:
    return f": pass its ViT, {attribute(found.path)}" if found.path else ""


def refuse_by_class(model: Any, name: str) -> None:
    """Raise InputError where a class is not the one that the description stands for: all that can be said of a model without numbers."""
    if type(model).__name__ not in ("VisionTransformer", "VisionTransformerDistilled"):
        raise InputError(f"{name} is not supported: without weights nothing tells what {type(model).__name__} computes")
    norms: list[tuple[int | None, Any]] = [(None, norm) for norm in (getattr(model, part, None) for part in ("norm_pre", "norm", "fc_norm"))]
    if not isinstance(getattr(model.patch_embed, "norm", nn.Identity()), nn.Identity):
        raise InputError(f"{name} is not supported: its patch embedding is normalised")
    for i, block in enumerate(model.blocks):
        for module, wanted, what in (
            (block, "Block", "pre-norm block"),
            (block.attn, "Attention", "self-attention"),
            (block.mlp, "Mlp", "two-layer MLP"),
        ):
            if type(module).__name__ != wanted:
                raise InputError(f"{name} is not supported: block {i}: {type(module).__name__} is not the standard {what}")
        norms += [(i, norm) for norm in (block.norm1, block.norm2, getattr(block.attn, "q_norm", None), getattr(block.attn, "k_norm", None))]
    for at, norm in norms:
        if not isinstance(norm, nn.LayerNorm | nn.Identity | None):
            where = "" if at is None else f"block {at}: "
            raise InputError(f"{name} is not supported: {where}its normalisation {type(norm).__name__} is not LayerNorm")


def refuse_nan(model: nn.Module) -> None:
    """Raise InputError where weights are no numbers."""
    bad = [name for name, weight in model.named_parameters() if not torch.isfinite(weight.detach()).all()]
    if bad:
        raise InputError(f"the model's weights hold NaN or infinity, first in {bad[0]} ({len(bad)} of its tensors): check the checkpoint")


def _attend(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _error(mine: Tensor | None, theirs: Tensor | None) -> float:
    """||mine - theirs|| / ||theirs||; infinity where one is missing or there is nothing to divide by."""
    if mine is None or theirs is None:
        return float("inf")
    if torch.equal(mine, theirs):
        return 0.0
    size = theirs.double().norm()
    return float((mine.double() - theirs.double()).norm() / size) if size else float("inf")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
