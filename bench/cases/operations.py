"""Benchmark cases of the operations: data. What is called, on which shapes, and what must at least be moved and computed."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from smi.kernels.comparison import Example

from ..sides import plain_operations

BATCH, HEADS, HEAD_WIDTH, WIDTH, HIDDEN, IMAGE, PATCH = 128, 12, 64, 768, 3072, 224, 16  # DeiT-Base
SDPA = {"sdpa flash": "FLASH_ATTENTION", "sdpa efficient": "EFFICIENT_ATTENTION", "sdpa cudnn": "CUDNN_ATTENTION"}


@dataclass(frozen=True)
class Case:
    """operation: its folder. build: device, dtype -> Example. others: alternatives by name, called with `plain` arguments where given, else with the
    example's. bytes, operations: least traffic and arithmetic of forward and backward. size: the operation's class of sizes."""

    operation: str
    name: str
    dtype: torch.dtype
    build: Callable[[torch.device, torch.dtype], Example]
    others: dict[str, Callable]
    bytes: int
    operations: int
    plain: Callable[[dict], dict] = dict
    size: str = "any"


def random(device, dtype, *shape, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=dtype) * scale


def example(operation: str, arguments: dict, inputs: tuple[str, ...] = (), mutated: tuple[str, ...] = (), name: str | None = None) -> Example:
    """Public function `name` of an operation (by default the one named like it), and its definition, on arguments."""
    public, reference = (getattr(import_module(f"smi.kernels.{operation}{module}"), name or operation) for module in ("", ".reference"))
    return Example(public, reference, arguments, inputs, mutated)


def attention_case(tokens: int, batch: int = BATCH) -> Case:
    def build(device, dtype):
        return example("attention", {"qkv": random(device, dtype, batch, tokens, 3, HEADS, HEAD_WIDTH)}, inputs=("qkv",))

    size = "short" if tokens <= 256 else "long"
    rows, square = batch * HEADS * tokens * HEAD_WIDTH, batch * HEADS * tokens * tokens * HEAD_WIDTH
    others = {"eager": plain_operations.attention, **{name: plain_operations.sdpa(backend) for name, backend in SDPA.items()}}
    # 4 tensors each way of the forward, 8 of the backward (q k v o do, dq dk dv); 2 products forward, 5 backward
    return Case("attention", f"{batch}x{tokens} tokens", torch.bfloat16, build, others, 2 * 12 * rows, 2 * 7 * square, size=size)


def cls_case(tokens: int) -> Case:
    def build(device, dtype):
        arguments = {"q": random(device, dtype, BATCH, 1, HEADS, HEAD_WIDTH), "kv": random(device, dtype, BATCH, tokens, 2, HEADS, HEAD_WIDTH)}
        return example("cls_attention", arguments, inputs=("q", "kv"))

    rows = BATCH * tokens * WIDTH  # k and v are read twice, dk and dv written
    return Case(
        "cls_attention", f"{BATCH}x{tokens} tokens", torch.bfloat16, build, {"eager": plain_operations.cls_attention}, 2 * 6 * rows, 2 * 7 * rows
    )


def norm_case(tokens: int) -> Case:
    rows = BATCH * tokens

    def build(device, dtype):
        x, residual = random(device, dtype, 2, rows, WIDTH).unbind()
        weight, bias = random(device, dtype, 2, WIDTH).unbind()
        arguments = {"x": x, "weight": weight, "bias": bias, "eps": 1e-6, "residual": residual}
        return example("layer_norm", arguments, inputs=("x", "residual"))

    return Case("layer_norm", f"{BATCH}x{tokens} tokens", torch.bfloat16, build, {"eager": plain_operations.layer_norm}, 2 * 8 * rows * WIDTH, 0)


def gelu_case(tokens: int) -> Case:
    rows = BATCH * tokens

    def build(device, dtype):
        weight = random(device, dtype, HIDDEN, WIDTH, scale=WIDTH**-0.5)
        arguments = {"x": random(device, dtype, rows, WIDTH), "weight": weight, "bias": random(device, dtype, HIDDEN), "activation": "gelu"}
        return example("linear_gelu", arguments, inputs=("x",))

    traffic = 2 * (2 * rows * WIDTH + 4 * rows * HIDDEN + 2 * WIDTH * HIDDEN)
    others = {"eager": plain_operations.linear_gelu}
    return Case("linear_gelu", f"{BATCH}x{tokens} tokens", torch.bfloat16, build, others, traffic, 4 * rows * WIDTH * HIDDEN)


def residual_case(tokens: int) -> Case:
    rows = BATCH * tokens

    def build(device, dtype):
        weight = random(device, dtype, WIDTH, HIDDEN, scale=HIDDEN**-0.5)
        more = {"bias": random(device, dtype, WIDTH), "residual": random(device, dtype, rows, WIDTH), "gamma": None}
        arguments = {"x": random(device, dtype, rows, HIDDEN), "weight": weight, **more}
        return example("linear_residual", arguments, inputs=("x", "residual"))

    traffic = 2 * (2 * rows * HIDDEN + 3 * rows * WIDTH + 2 * WIDTH * HIDDEN)
    others = {"eager": plain_operations.linear_residual}
    return Case("linear_residual", f"{BATCH}x{tokens} tokens", torch.bfloat16, build, others, traffic, 4 * rows * WIDTH * HIDDEN)


def active(device, n: int) -> torch.Tensor:
    """n distinct patches of each image."""
    return torch.rand(BATCH, (IMAGE // PATCH) ** 2, device=device).argsort(1)[:, :n].to(torch.int32)


def embed_case(n: int) -> Case:
    moved = (-13, 22, 1)

    def build(device, dtype):
        weight = random(device, dtype, WIDTH, 3 * PATCH**2, scale=(3 * PATCH**2) ** -0.5)
        tables = {"position": random(device, dtype, (IMAGE // PATCH) ** 2, WIDTH), "prefix": random(device, dtype, 1, WIDTH)}
        arguments = {
            "images": random(device, dtype, BATCH, 3, IMAGE, IMAGE), "index": active(device, n), "weight": weight,
            "bias": random(device, dtype, WIDTH), **tables,
            "augmentation": torch.tensor(moved, device=device, dtype=torch.int32), "patch_size": PATCH,
        }  # fmt: skip
        return example("patch_embed", arguments, inputs=("images",))

    pixels, tokens = BATCH * n * 3 * PATCH**2, BATCH * n * WIDTH
    traffic = 2 * (pixels + 2 * tokens + 2 * WIDTH * 3 * PATCH**2 + BATCH * 3 * IMAGE**2)
    others = {"eager": plain_operations.patch_embed}
    name = f"{BATCH} images, {n} patches"
    return Case("patch_embed", name, torch.bfloat16, build, others, traffic, 4 * pixels * WIDTH, lambda given: given | {"augmentation": moved})


def step_case(n: int) -> Case:
    def build(device, dtype):
        images, grad, exp_avg = random(device, dtype, 3, BATCH, 3, IMAGE, IMAGE).unbind()
        moments = {"exp_avg": exp_avg, "exp_avg_sq": grad.square(), "step": torch.tensor(100, device=device, dtype=torch.int32)}
        low, high = torch.full((3,), -2.0, device=device), torch.full((3,), 2.0, device=device)
        norms = plain_operations.tv_norms(images)
        more = {"low": low, "high": high, "index": active(device, n), "norms": norms, "tv_weight": 1e-4}
        arguments = {"images": images, "grad": grad, **moments, **more}
        return example("image_step", arguments, mutated=("images", "exp_avg", "exp_avg_sq"))

    def plain(given: dict) -> dict:  # research code steps all pixels
        return {name: value for name, value in given.items() if name != "index"}

    name = f"{BATCH} images, {n} patches"
    return Case("image_step", name, torch.float32, build, {"eager": plain_operations.image_step}, 4 * 7 * BATCH * n * 3 * PATCH**2, 0, plain)


def tv_case() -> Case:
    def build(device, dtype):
        return example("image_step", {"images": random(device, dtype, BATCH, 3, IMAGE, IMAGE)}, name="tv_norms")

    return Case("image_step", f"tv_norms, {BATCH} images", torch.float32, build, {"eager": plain_operations.tv_norms}, 4 * BATCH * 3 * IMAGE**2, 0)


CASES = (
    *(attention_case(tokens) for tokens in (29, 47, 50, 99, 148, 197)),
    attention_case(577, 16),
    *(cls_case(tokens) for tokens in (47, 197)),
    *(norm_case(tokens) for tokens in (47, 197)),
    *(gelu_case(tokens) for tokens in (47, 197)),
    *(residual_case(tokens) for tokens in (47, 197)),
    *(embed_case(n) for n in (46, 196)),
    *(step_case(n) for n in (46, 196)),
    tv_case(),
)


def select(only: list[str] | None) -> tuple[Case, ...]:
    """The cases of some operations, all without a choice."""
    return tuple(case for case in CASES if not only or case.operation in only)
