"""Random small ViTs: a specification as plain data, and the model that it makes; and what the model itself answers, by its own modules."""

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .draw import Draw

HOOKS = ("forward hook", "pre-hook", "own forward", "parametrised", "subclass", "watching hook", "swapped norm")
PLACES = ("attn", "mlp", "mlp.fc2", "attn.proj", "attn.qkv", "norm1", "norm2", "")  # in a block; "": the block itself
WRAPS = ("DataParallel", "Sequential")


def spec(draw: Draw, strange: bool = True) -> dict[str, Any]:
    """strange: also pruned widths, hooks and features that may be refused."""
    heads, width = draw.choice((1, 2, 3, 4)), draw.choice((4, 8, 2, 3, 5, 6, 12, 16, 20, 32, 33, 48, 64))
    patch = draw.choice((2, 4, 1, 3, 5, 7, 8, 16))
    rows, columns = draw.choice(((2, 2), (1, 1), (1, 4), (3, 2), (4, 4), (5, 1), (3, 5), (2, 7)))
    options: dict[str, Any] = {
        "img_size": [rows * patch, columns * patch],
        "patch_size": patch,
        "in_chans": draw.choice((1, 3, 2, 4, 5)),
        "num_classes": draw.choice((2, 1, 3, 5, 10, 17)),
        "embed_dim": heads * width,
        "num_heads": heads,
        "depth": draw.choice((1, 2, 3)),
    }
    for name, values in FEATURES.items():
        if draw.chance(5):
            options[name] = draw.choice(values)
    made: dict[str, Any] = {"seed": draw.below(1000), "distilled": draw.chance(8), "options": options}
    if made["distilled"]:  # timm's own forward of it knows neither
        options.pop("reg_tokens", None)
        options.pop("no_embed_class", None)
    if strange and draw.chance(6):
        options |= [draw.choice(REFUSABLE)]
    if strange and draw.chance(3):
        made["pruned"] = [[draw.below(3), draw.choice(("mlp", "head")), draw.choice((8, 1, 3, 16, 17, 31, 100))] for _ in range(draw.integer(1, 2))]
    if strange and draw.chance(6):
        made["hook"] = [draw.choice(HOOKS), draw.below(3), draw.choice(PLACES)]
    if strange and draw.chance(12):
        made["wrap"] = draw.choice(WRAPS)
    if strange and draw.chance(6):
        made["dtype"] = draw.choice(("float64", "bfloat16", "float16"))
    return made


FEATURES: dict[str, tuple] = {
    "mlp_ratio": (2, 1, 0.5, 3.5),
    "qkv_bias": (False,),
    "proj_bias": (False,),
    "qk_norm": (True,),
    "init_values": (0.1, 1e-5),
    "pos_embed": ("none",),
    "no_embed_class": (True,),
    "reg_tokens": (1, 4),
    "pre_norm": (True,),
    "global_pool": ("avg",),
    "act_layer": ("gelu_tanh", "quick_gelu"),
    "fc_norm": (True, False),
    "drop_rate": (0.3,),
    "attn_drop_rate": (0.3,),
    "drop_path_rate": (0.3,),
}
REFUSABLE = tuple(
    {name: value}.popitem()
    for name, value in (
        ("final_norm", False), ("class_token", False), ("scale_attn_norm", True), ("scale_mlp_norm", True), ("num_classes", 0),
        ("norm_layer", "rmsnorm"),
        ("act_layer", "relu"), ("act_layer", "silu"), ("global_pool", "max"), ("global_pool", "avgmax"), ("global_pool", "map"), ("global_pool", ""),
        ("pool_include_prefix", True), ("dynamic_img_size", True), ("embed_norm_layer", "layernorm"), ("patch_drop_rate", 0.3),
    )
)  # fmt: skip


def build(made: dict[str, Any]) -> nn.Module | None:
    """The model of a specification in evaluation mode, every parameter random; None where timm makes no such model."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    options = {**made["options"], "img_size": tuple(made["options"]["img_size"])}
    with torch.random.fork_rng():
        torch.manual_seed(made["seed"])
        try:
            model: Any = (VisionTransformerDistilled if made["distilled"] else VisionTransformer)(**options).eval()
            for block, what, width in made.get("pruned", []):
                _prune(model, model.blocks[block % len(model.blocks)], what, width)
        except (AssertionError, TypeError, ValueError, RuntimeError, AttributeError):
            return None
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    channels = options["in_chans"]
    model.pretrained_cfg = {"architecture": "random", "mean": (0.5, 0.4, 0.3, 0.2, 0.1)[:channels], "std": (0.2, 0.25, 0.3, 0.3, 0.2)[:channels]}
    if "hook" in made:
        model = _hooked(model, *made["hook"])
    model = model.to(getattr(torch, made.get("dtype", "float32")))
    return {"DataParallel": nn.DataParallel, "Sequential": nn.Sequential}[made["wrap"]](model) if "wrap" in made else model


def _prune(model: Any, block: Any, what: str, width: int) -> None:
    """Another width of a block's MLP, or of its heads, as structural pruning leaves it."""
    d = model.embed_dim
    if what == "mlp":
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(d, width), nn.Linear(width, d)
        return
    attention, inner = block.attn, block.attn.num_heads * width
    attention.qkv, attention.proj = nn.Linear(d, 3 * inner, bias=attention.qkv.bias is not None), nn.Linear(inner, d)
    attention.head_dim, attention.attn_dim, attention.scale = width, inner, width**-0.5
    for name in ("q_norm", "k_norm"):
        if not isinstance(getattr(attention, name), nn.Identity):
            setattr(attention, name, nn.LayerNorm(width))


def _half(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    return type(module).forward(module, *inputs, **named) * 0.5


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def _hooked(model: Any, how: str, number: int, place: str) -> Any:
    """The model, which no longer computes what its modules' names say."""
    block = model.blocks[number % len(model.blocks)]
    module = block.get_submodule(place)
    if how == "forward hook":
        module.register_forward_hook(lambda module, inputs, output: output * 0.5)
    elif how == "watching hook":
        module.register_forward_hook(lambda module, inputs, output: None)
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5, *inputs[1:]))
    elif how == "own forward":
        module.forward = MethodType(_half, module)  # which a copy of the model binds to its own module
    elif how == "parametrised":
        parametrize.register_parametrization(block.mlp.fc1, "weight", _Halved())
    elif how == "swapped norm":
        block.norm1, block.norm2 = block.norm2, block.norm1
    else:
        kind = type(model)
        model.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x: kind.forward(self, x) * 2})
    return model


def inner(model: Any) -> Any:
    """The ViT in its wrapper."""
    return model.module if isinstance(model, nn.DataParallel) else model[0] if isinstance(model, nn.Sequential) else model


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another dtype."""
    return copy.deepcopy(model).to(dtype)


def own_sparse(model: Any, images: Tensor, index: Tensor) -> Tensor:
    """The model's logits [B, classes] for its prefix tokens and the patches `index` [B, n] of images [B, C, H, W], by its own modules."""
    x = model._pos_embed(model.patch_embed(images))
    prefix = torch.arange(model.num_prefix_tokens).expand(len(index), -1)
    kept = torch.cat([prefix, model.num_prefix_tokens + index], 1)
    x = model.norm_pre(x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])))
    for block in model.blocks:
        x = block(x)
    return model.forward_head(model.norm(x))
