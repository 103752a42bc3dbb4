"""Benchmark cases of the operations: data. What is called, on which shapes, and what must at least be moved and computed.

Every builder takes the batch and the model's sizes, so that the CPU measures the same cases as a GPU, at a smaller batch.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from importlib import import_module

import torch

from smi.kernels import versions
from smi.kernels.comparison import Example
from smi.kernels.patch_embed.sizes import LARGE_FROM

from ..sides import plain_operations

GPU_BATCH, CPU_BATCH = 128, 4  # images
SDPA = {"sdpa flash": "FLASH_ATTENTION", "sdpa efficient": "EFFICIENT_ATTENTION", "sdpa cudnn": "CUDNN_ATTENTION"}


@dataclass(frozen=True)
class Sizes:
    """A ViT and its square images of three channels; by default DeiT-Base at 224 pixels."""

    heads: int = 12
    head_width: int = 64
    hidden: int = 3072  # of the MLP
    image: int = 224  # pixels of a side
    patch: int = 16

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @property
    def patches(self) -> int:
        """Of an image."""
        return (self.image // self.patch) ** 2

    @property
    def patch_values(self) -> int:
        """Numbers in the pixels of a patch."""
        return 3 * self.patch**2


DEIT_BASE = Sizes()


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    operation: its folder. shape: in words. build: device, dtype -> Example. others: alternatives by name, called with `plain` arguments where given,
    else with the example's. bytes, flops: least traffic and arithmetic of forward and backward. sizes: class of sizes of each raw function called.
    """

    operation: str
    shape: str
    dtype: torch.dtype
    build: Callable[[torch.device, torch.dtype], Example]
    others: dict[str, Callable]
    bytes: int
    flops: int
    plain: Callable[[dict], dict] = dict
    sizes: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.operation} {self.shape}"

    def in_dtype(self, dtype: torch.dtype) -> "Case":
        """The same case in another dtype, with the traffic that it needs."""
        return replace(self, dtype=dtype, bytes=self.bytes * dtype.itemsize // self.dtype.itemsize)


def cases(batch: int, only: Collection[str] | None = None) -> tuple[Case, ...]:
    """All cases at a batch of images, or those of the operations in `only`, the most important first; at 577 tokens an eighth of the batch."""
    found = (
        *(make(tokens, batch) for tokens in (47, 197) for make in (attention_case, cls_case, norm_case, gelu_case, residual_case)),
        *(make(patches, batch) for patches in (46, 196) for make in (embed_case, step_case)),
        tv_case(batch),
        *(attention_case(tokens, batch) for tokens in (29, 50, 99, 148)),
        attention_case(577, max(1, batch // 8)),
    )
    return tuple(case for case in found if not only or case.operation in only)


def random(device, dtype, *shape, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=dtype) * scale


def random_patches(device, batch: int, n: int, sizes: Sizes) -> torch.Tensor:
    """n distinct patches of each image, int32 [batch, n]."""
    return torch.rand(batch, sizes.patches, device=device).argsort(1)[:, :n].to(torch.int32)


def example(operation: str, arguments: dict, inputs: tuple[str, ...] = (), mutated: tuple[str, ...] = (), name: str | None = None) -> Example:
    """Public function `name` of an operation (by default the one named like it), and its definition, on arguments."""
    public, reference = (getattr(import_module(f"smi.kernels.{operation}{module}"), name or operation) for module in ("", ".reference"))
    return Example(public, reference, arguments, inputs, mutated)


def both(operation: str, *shapes: tuple[int, ...]) -> dict[str, str]:
    """Class of sizes of forward and backward of an operation whose forward takes tensors of these shapes first."""
    size = versions.size_class(operation, "forward", tuple(torch.empty(shape, device="meta") for shape in shapes) + (None,))
    return {"forward": size, "backward": size}


def attention_case(tokens: int, batch: int, sizes: Sizes = DEIT_BASE) -> Case:
    def build(device, dtype):
        return example("attention", {"qkv": random(device, dtype, batch, tokens, 3, sizes.heads, sizes.head_width)}, inputs=("qkv",))

    sizes_of_calls = both("attention", (batch, tokens, 3, sizes.heads, sizes.head_width))
    rows, square = batch * tokens * sizes.width, batch * tokens * tokens * sizes.width
    others = {"eager": plain_operations.attention, **{name: plain_operations.sdpa(backend) for name, backend in SDPA.items()}}
    # forward moves 4 tensors (q k v out), backward 8 (q k v out dout, dq dk dv); forward has 2 GEMMs, backward 5
    return Case("attention", f"{batch}x{tokens} tokens", torch.bfloat16, build, others, 2 * 12 * rows, 2 * 7 * square, sizes=sizes_of_calls)


def cls_case(tokens: int, batch: int, sizes: Sizes = DEIT_BASE) -> Case:
    def build(device, dtype):
        q = random(device, dtype, batch, 1, sizes.heads, sizes.head_width)
        kv = random(device, dtype, batch, tokens, 2, sizes.heads, sizes.head_width)
        return example("cls_attention", {"q": q, "kv": kv}, inputs=("q", "kv"))

    rows = batch * tokens * sizes.width  # k and v are read twice, dk and dv written
    others = {"eager": plain_operations.cls_attention}
    return Case(
        "cls_attention", f"{batch}x{tokens} tokens", torch.bfloat16, build, others, 2 * 6 * rows, 2 * 7 * rows,
        sizes=both("cls_attention", (batch, 1, sizes.heads, sizes.head_width)),
    )  # fmt: skip


def norm_case(tokens: int, batch: int, sizes: Sizes = DEIT_BASE) -> Case:
    rows, width = batch * tokens, sizes.width

    def build(device, dtype):
        x, residual = random(device, dtype, 2, rows, width).unbind()
        weight, bias = random(device, dtype, 2, width).unbind()
        arguments = {"x": x, "weight": weight, "bias": bias, "eps": 1e-6, "residual": residual}
        return example("layer_norm", arguments, inputs=("x", "residual"))

    return Case(
        "layer_norm", f"{batch}x{tokens} tokens", torch.bfloat16, build, {"eager": plain_operations.layer_norm}, 2 * 8 * rows * width, 0,
        sizes=both("layer_norm", (rows, width)),
    )  # fmt: skip


def gelu_case(tokens: int, batch: int, sizes: Sizes = DEIT_BASE) -> Case:
    rows, width, hidden = batch * tokens, sizes.width, sizes.hidden

    def build(device, dtype):
        weight = random(device, dtype, hidden, width, scale=width**-0.5)
        arguments = {"x": random(device, dtype, rows, width), "weight": weight, "bias": random(device, dtype, hidden), "activation": "gelu"}
        return example("linear_gelu", arguments, inputs=("x",))

    traffic = 2 * (2 * rows * width + 4 * rows * hidden + 2 * width * hidden)
    others = {"eager": plain_operations.linear_gelu}
    return Case(
        "linear_gelu",
        f"{batch}x{tokens} tokens",
        torch.bfloat16,
        build,
        others,
        traffic,
        4 * rows * width * hidden,
        sizes=both("linear_gelu", (rows, width)),
    )


def residual_case(tokens: int, batch: int, sizes: Sizes = DEIT_BASE) -> Case:
    rows, width, hidden = batch * tokens, sizes.width, sizes.hidden

    def build(device, dtype):
        weight = random(device, dtype, width, hidden, scale=hidden**-0.5)
        more = {"bias": random(device, dtype, width), "residual": random(device, dtype, rows, width), "gamma": None}
        arguments = {"x": random(device, dtype, rows, hidden), "weight": weight, **more}
        return example("linear_residual", arguments, inputs=("x", "residual"))

    traffic = 2 * (2 * rows * hidden + 3 * rows * width + 2 * width * hidden)
    others = {"eager": plain_operations.linear_residual}
    return Case(
        "linear_residual",
        f"{batch}x{tokens} tokens",
        torch.bfloat16,
        build,
        others,
        traffic,
        4 * rows * width * hidden,
        sizes=both("linear_residual", (rows, hidden)),
    )


def embed_case(n: int, batch: int, sizes: Sizes = DEIT_BASE) -> Case:
    width, values, moved = sizes.width, sizes.patch_values, (-13, 22, 1)

    def build(device, dtype):
        weight = random(device, dtype, width, values, scale=values**-0.5)
        tables = {"position": random(device, dtype, sizes.patches, width), "prefix": random(device, dtype, 1, width)}
        arguments = {
            "images": random(device, dtype, batch, 3, sizes.image, sizes.image), "index": random_patches(device, batch, n, sizes),
            "weight": weight, "bias": random(device, dtype, width), **tables,
            "augmentation": torch.tensor(moved, device=device, dtype=torch.int32), "patch_size": sizes.patch,
        }  # fmt: skip
        return example("patch_embed", arguments, inputs=("images",))

    pixels, tokens = batch * n * values, batch * n * width
    traffic = 2 * (pixels + 2 * tokens + 2 * width * values + batch * 3 * sizes.image**2)
    others = {"eager": plain_operations.patch_embed}
    name, large = f"{batch} images, {n} patches", {True: "large", False: "small"}
    classes = {"forward": large[batch * (n + 1) * width >= LARGE_FROM], "backward": large[batch * n * values >= LARGE_FROM]}
    return Case(
        "patch_embed", name, torch.bfloat16, build, others, traffic, 4 * pixels * width, lambda given: given | {"augmentation": moved},
        sizes={function: f"p{sizes.patch} {amount}" for function, amount in classes.items()},
    )  # fmt: skip


def step_case(n: int, batch: int, sizes: Sizes = DEIT_BASE) -> Case:
    def build(device, dtype):
        images, grad, exp_avg = random(device, dtype, 3, batch, 3, sizes.image, sizes.image).unbind()
        moments = {"exp_avg": exp_avg, "exp_avg_sq": grad.square(), "step": torch.tensor(100, device=device, dtype=torch.int32)}
        low, high = torch.full((3,), -2.0, device=device), torch.full((3,), 2.0, device=device)
        norms = plain_operations.tv_norms(images)
        more = {"low": low, "high": high, "index": random_patches(device, batch, n, sizes), "norms": norms, "tv_weight": 1e-4}
        arguments = {"images": images, "grad": grad, **moments, **more}
        return example("image_step", arguments, mutated=("images", "exp_avg", "exp_avg_sq"))

    def plain(given: dict) -> dict:  # research code steps all pixels
        return {name: value for name, value in given.items() if name != "index"}

    traffic = 4 * 7 * batch * n * sizes.patch_values
    return Case(
        "image_step", f"{batch} images, {n} patches", torch.float32, build, {"eager": plain_operations.image_step}, traffic, 0, plain,
        sizes={"forward": "all" if n == sizes.patches else f"p{sizes.patch}"},
    )  # fmt: skip


def tv_case(batch: int, sizes: Sizes = DEIT_BASE) -> Case:
    def build(device, dtype):
        return example("image_step", {"images": random(device, dtype, batch, 3, sizes.image, sizes.image)}, name="tv_norms")

    traffic = 4 * batch * 3 * sizes.image**2
    return Case(
        "image_step", f"tv_norms, {batch} images", torch.float32, build, {"eager": plain_operations.tv_norms}, traffic, 0, sizes={"tv_norms": "all"}
    )
