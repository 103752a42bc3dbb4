"""Models that tests share: small, random but not degenerate, one for each feature of timm's Vision Transformers."""

from itertools import zip_longest

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from smi.cli.main import run


def small_vit(kind=VisionTransformer, seed: int = 0, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), **options):
    """A ViT of two narrow blocks whose every parameter is random, LayerNorm and position embeddings included."""
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5, **options}
    torch.manual_seed(seed)
    model = kind(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    channels = options.get("in_chans", 3)
    model.pretrained_cfg = {"architecture": "small_vit", "mean": mean[:channels], "std": std[:channels]}
    return model


VARIANTS = {
    "plain": {},
    "patch 14": {"img_size": 42, "patch_size": 14},
    "patch 32": {"img_size": 64, "patch_size": 32},
    "not square": {"img_size": (12, 20)},
    "one channel": {"in_chans": 1},
    "distilled": {"kind": VisionTransformerDistilled},
    "registers": {"reg_tokens": 4},
    "registers without position": {"reg_tokens": 4, "no_embed_class": True},
    "layer scale": {"init_values": 0.1},
    "query-key norm": {"qk_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "CLIP": {"pre_norm": True},
    "average pool": {"global_pool": "avg"},
    "no position": {"pos_embed": "none"},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "QuickGELU": {"act_layer": "quick_gelu"},
    "wide heads": {"embed_dim": 80, "num_heads": 1},
}


def pruned(hidden=(), heads=(), width=(), **options):
    """A ViT whose block i has another hidden width, number of heads or head width, as structured pruning leaves it."""
    model = VisionTransformer(**options)
    d = options["embed_dim"]
    for block, size in zip(model.blocks, hidden, strict=False):
        block.mlp.fc1, block.mlp.fc2 = torch.nn.Linear(d, size), torch.nn.Linear(size, d)
    for block, count, wide in zip_longest(model.blocks, heads, width):
        attn = block.attn
        count, wide = count or attn.num_heads, wide or attn.head_dim
        attn.num_heads, attn.head_dim, attn.attn_dim, attn.scale = count, wide, count * wide, wide**-0.5
        attn.qkv, attn.proj = torch.nn.Linear(d, 3 * count * wide), torch.nn.Linear(count * wide, d)
    return model


PRUNED = {  # of the variants, those that no architecture by name is
    "pruned MLP": {"kind": pruned, "depth": 3, "hidden": (96, 100, 7)},
    "pruned heads": {"kind": pruned, "depth": 3, "heads": (3, 1, 2)},
    "pruned head width": {"kind": pruned, "depth": 3, "hidden": (20, 96, 50), "width": (8, 16, 5)},
    "pruned, average pool": {"kind": pruned, "hidden": (96, 30), "heads": (1, 2), "global_pool": "avg"},
}


@pytest.fixture
def vit():
    return small_vit()


@pytest.fixture(params=VARIANTS | PRUNED, ids=lambda name: name.replace(" ", "-"))
def variant(request):
    return small_vit(**(VARIANTS | PRUNED)[request.param])


def fails(capsys, arguments, code, *parts):
    """The command line refuses in one sentence that has all parts, with this exit code."""
    assert run([str(argument) for argument in arguments]) == code
    err = capsys.readouterr().err
    assert err.startswith("smi: ")
    assert err.count("\n") == 1, f"one sentence expected, got: {err}"
    assert "Traceback" not in err
    for part in parts:
        assert part in err
