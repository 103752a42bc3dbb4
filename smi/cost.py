"""FLOPs of an inversion by the published counting rule and by our own, and the comparison that PRI's theorem makes.

Published rule: 384 times the forward multiply-adds of one image with the tokens of the LAST stage, patch embedding dense, attention's two GEMMs left
out, 4 operations per normalised element. It was found by arithmetic and reproduces the four figures of the SMI paper's table exactly.
Our count: 2 FLOPs per multiply-add of every GEMM of the engine, forward and backward to the pixels, stage by stage.
"""

from dataclasses import asdict, dataclass

import torch

from .engine import Mode
from .errors import InputError
from .inversion.memory_estimate import step_memory
from .inversion.methods import COMPARED
from .inversion.schedules import Schedule, make_schedule
from .models.by_name import EMBEDDED, load_model
from .models.vit import Block, ViT, describe
from .plain import whole

PUBLISHED_FACTOR = 384  # forward and twice that for the backward pass, times a batch of 128
NORM_OPS = 4  # per element, in the published rule


def _block_linear(block: Block) -> int:
    """Multiply-adds of a block's four linear layers, per token."""
    return sum(layer.weight.numel() for layer in (block.qkv, block.proj, block.fc1, block.fc2))


def _heads(vit: ViT) -> int:
    """Multiply-adds of the classifiers, per image."""
    return sum(head.weight.numel() for head in vit.heads)


def published_gflops(vit: ViT, schedule: Schedule) -> float:
    """GFLOPs as the SMI paper's table counts them."""
    tokens = schedule.patches_per_image + vit.num_prefix
    norms = 2 * len(vit.blocks) + sum(norm is not None for norm in (vit.norm_pre, vit.norm, vit.fc_norm))
    macs = (
        tokens * sum(map(_block_linear, vit.blocks))
        + vit.num_patches * vit.embed.weight.numel()
        + _heads(vit)
        + NORM_OPS * norms * tokens * vit.embed_dim
    )
    return PUBLISHED_FACTOR * macs / 1e9


def step_flops(vit: ViT, active: int, cls_only: bool = False) -> int:
    """FLOPs of one iteration of one trajectory, forward and gradient of the pixels, with `active` patches.

    A linear layer costs the same forward and backward (weights are frozen), attention twice as much backward. cls_only: the last block computes
    queries, projection and MLP for the prefix tokens alone, which is exact and is the floor of any engine; the reference engine does not.
    """
    tokens, prefix = active + vit.num_prefix, vit.num_prefix
    full, last = (vit.blocks[:-1], vit.blocks[-1]) if cls_only else (vit.blocks, None)
    macs = 2 * (tokens * sum(map(_block_linear, full)) + active * vit.embed.weight.numel() + _heads(vit))
    macs += 3 * tokens * sum(2 * tokens * block.width for block in full)  # attention: multiply-adds per query token
    if last is not None:
        keys_values = 2 * last.width * vit.embed_dim
        macs += 2 * (tokens * keys_values + prefix * (_block_linear(last) - keys_values)) + 3 * prefix * 2 * tokens * last.width
    else:
        macs += 2 * tokens * vit.blocks[-1].width  # the CLS row that ranks patches, read apart, forward only
    return 2 * macs


def trajectory_flops(vit: ViT, schedule: Schedule, cls_only: bool = False) -> int:
    """FLOPs of one trajectory from noise to its last image."""
    return sum((stage.stop - stage.start) * step_flops(vit, stage.active, cls_only) for stage in schedule.stages())


def image_flops(vit: ViT, schedule: Schedule, cls_only: bool = False) -> float:
    """FLOPs per finished image."""
    return trajectory_flops(vit, schedule, cls_only) / schedule.images_per_trajectory


@dataclass(frozen=True)
class Theorem:
    """Cost per finished image of PRI relative to dense, and of an idealised SMI that prunes to the same N/v patches before the first iteration.

    PRI paper's theorem: PRI is cheaper than both in the linear layers for v > 1, and in self-attention (its projections included) whenever N/d < 3.
    """

    division: int
    pri_linear: float  # (v + 1) / (2 v^2)
    smi_linear: float  # 1 / v
    pri_attention: float  # self-attention layer: four d x d projections and the two GEMMs
    smi_attention: float
    patches_over_dim: float  # N / d
    bound: float  # PRI's self-attention is cheaper while N / d is below 6 v / (2 v - 1), which is at least 3


def theorem(num_patches: int, embed_dim: int, division: int) -> Theorem:
    """The theorem's comparison for N patches, embedding dimension d and v images a trajectory."""
    v, n, d = division, num_patches, embed_dim

    def layer(patches: float) -> float:
        return 4 * patches * d * d + 2 * patches * patches * d

    pri = sum(layer(k * n / v) for k in range(1, v + 1)) / v / v
    return Theorem(v, (v + 1) / (2 * v * v), 1 / v, pri / layer(n), layer(n / v) / layer(n), n / d, 6 * v / (2 * v - 1))


def cost_table(model: str, image_size: tuple[int, int] | None, method: str | None, iterations: int, batch_size: int, options: dict) -> dict:
    """FLOPs and memory of the methods on a model, without building its weights."""
    batch_size = whole(1)("batch-size", batch_size)
    if method is None and any(value is not None for value in options.values()):
        raise InputError("the options of a schedule need --method")
    if model == EMBEDDED:
        vit = describe(load_model(model)).to("meta", torch.float32)
    else:
        vit = describe(_without_weights(model, image_size)).to("meta", torch.float32)
    if method is None:
        cases = [(each.name, each.options) for each in COMPARED if (each.division or 1) <= vit.num_patches]
    else:
        cases = [(method, options)]
    reference = make_schedule("dense", vit.num_patches, iterations)
    rows = [_cost_row(vit, name, make_schedule(name, vit.num_patches, iterations, **given), reference, batch_size) for name, given in cases]
    divisions = sorted({row["images_per_trajectory"] for row in rows if row["images_per_trajectory"] > 1})
    theorems = [asdict(theorem(vit.num_patches, vit.embed_dim, v)) for v in divisions]
    return {
        "model": vit.name,
        "patches": vit.num_patches,
        "embed_dim": vit.embed_dim,
        "iterations": iterations,
        "batch_size": batch_size,
        "rows": rows,
        "theorem": theorems,
    }


def _without_weights(model: str, image_size: tuple[int, int] | None) -> torch.nn.Module:
    try:
        return load_model(model, random_weights=True, image_size=image_size, device="meta")
    except InputError:  # of the input, which then is said again, or of an early timm 1.0, which computes on what it builds
        return load_model(model, random_weights=True, image_size=image_size)


def _cost_row(vit: ViT, name: str, schedule: Schedule, reference: Schedule, batch_size: int) -> dict:
    peak = step_memory(vit, batch_size, schedule.num_patches, Mode(torch.float32))
    last = step_memory(vit, batch_size, list(schedule.stages())[-1].active, Mode(torch.float32))
    flops = image_flops(vit, schedule)
    return {
        "method": name,
        "patches_per_image": schedule.patches_per_image,
        "sparsity": schedule.sparsity,
        "images_per_trajectory": schedule.images_per_trajectory,
        "published_gflops": published_gflops(vit, schedule),
        "step_gflops_mean": trajectory_flops(vit, schedule) / schedule.iterations / 1e9,
        "step_gflops_last": step_flops(vit, list(schedule.stages())[-1].active) / 1e9,
        "image_tflops": flops / 1e12,
        "floor_image_tflops": image_flops(vit, schedule, cls_only=True) / 1e12,
        "speedup": image_flops(vit, reference) / flops,
        "memory_first_gib": peak.total / 2**30,
        "memory_last_gib": last.total / 2**30,
    }
