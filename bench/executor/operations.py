"""What is executed: every operation on small inputs that make its own launchers take each shipped tile, a block or a few of it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import torch
from torch import Tensor

from smi.kernels import dispatch, tuned, versions
from smi.kernels.attention import reference as attention_reference
from smi.kernels.attention import tiles as attention_tiles
from smi.kernels.attention.op import attention
from smi.kernels.cls_attention import reference as cls_reference
from smi.kernels.cls_attention.op import cls_attention
from smi.kernels.comparison import Example
from smi.kernels.compile_case import CompileCase
from smi.kernels.image_step import reference as step_reference
from smi.kernels.image_step.op import image_step, tv_norms
from smi.kernels.layer_norm import reference as norm_reference
from smi.kernels.layer_norm.op import layer_norm
from smi.kernels.linear_gelu import reference as gelu_reference
from smi.kernels.linear_gelu.op import linear_gelu
from smi.kernels.linear_residual import reference as residual_reference
from smi.kernels.linear_residual.op import linear_residual
from smi.kernels.patch_embed import reference as embed_reference
from smi.kernels.patch_embed.op import patch_embed

DTYPES = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}
LONG = 130  # tokens of a kernel that takes any number: three tiles of keys, so that what is fetched ahead goes round
ANY = "any"


@dataclass(frozen=True)
class Work:
    """An example in one dtype. cases: names of the compile cases that it makes the launchers take; tiles: their numbers by the start of the slot that
    a launcher asks `tuned.tile` for; pair: whether attention takes its pair of backward kernels, which is for longer sequences otherwise."""

    name: str
    example: Example
    dtype: torch.dtype
    cases: tuple[str, ...]
    tiles: dict[str, tuple] = field(default_factory=dict)
    pair: bool = False

    def in_half(self) -> "Work":
        """The same in float16, which takes the tiles of bf16; no compile case is in it."""
        return replace(self, name=self.name + " float16", dtype=torch.float16, cases=())

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Within it launchers take CPU tensors and these tiles."""

        def tile(operation: str, slot: str, built_in: tuple, device: torch.device) -> tuple:
            numbers = next((numbers for start, numbers in self.tiles.items() if slot.startswith(start)), built_in)
            return type(built_in)(*numbers) if hasattr(built_in, "_make") else tuple(numbers)  # what is not named has its default

        with ExitStack() as stack:
            stack.enter_context(patch.object(versions, "interpreting", lambda: True))
            stack.enter_context(patch.object(tuned, "tile", tile))
            if self.pair:
                stack.enter_context(patch.object(attention_tiles, "backward", lambda *_: None))
            yield


def random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def dtype_of(case: CompileCase, tensor: str) -> torch.dtype:
    return DTYPES[case.types[tensor]]


def numbers(case: CompileCase, *names: str) -> tuple:
    """The case's tile: these constants, warps and stages."""
    return *(case.constants.get(name, 0) for name in names), case.num_warps, case.num_stages


# ---- attention


def tokens_of(case: CompileCase, shorter: int) -> int:
    """A length for a tile of attention, longer than the next tile is for."""
    label = case.name.split("/")[1].split("-")[1].removeprefix("n")
    if not label.isdigit():
        return LONG
    most = int(label)
    return most - 3 if most <= 64 else max(shorter + 3, most * 3 // 4 + 5)


def attention_works(cases: list[CompileCase]) -> Iterator[Work]:
    """By width, number and whether rows are gathered: each backward tile behind the forward tile of its length, then the pair."""
    groups: dict[str, dict[str, CompileCase]] = {}
    for case in cases:
        _, kernel, configuration = case.name.split("/")
        groups.setdefault(configuration, {})[kernel] = case
    for configuration, by_kernel in groups.items():
        forwards = {tokens_of(case, 0): case for kernel, case in by_kernel.items() if kernel.startswith("fwd")}
        shorter = 0
        for kernel, case in by_kernel.items():
            if not kernel.startswith("bwd-n"):
                continue
            n = tokens_of(case, shorter)
            shorter = int(kernel.split("-")[1].removeprefix("n"))
            forward = forwards.get(n, forwards[max(forwards)])
            tiles = {"bwd-n": numbers(case, "BT", "BS", "BE")}
            yield attention_work(configuration, n, forward, tiles, (case,))
        done = {work_n for work_n in forwards if any(k.startswith(f"bwd-n{work_n + 3}") for k in by_kernel)}
        pair = {kernel: by_kernel[kernel] for kernel in ("bwd-queries", "bwd-keys")}
        tiles = {kernel: numbers(case, "BT", "BS", "BE") for kernel, case in pair.items()}
        for n, forward in forwards.items():
            if n not in done:
                yield attention_work(configuration, n, forward, tiles, tuple(pair.values()), pair=True)


def attention_work(configuration: str, n: int, forward: CompileCase, tiles: dict, backward: tuple[CompileCase, ...], pair: bool = False) -> Work:
    width, gathered = forward.constants["D"], forward.constants["USE_INDEX"]
    rows = n + 7 if gathered else n
    arguments = {"qkv": random(1, rows, 3, 1, width)}
    if gathered:
        arguments |= {"index": torch.rand(1, rows).argsort(1)[:, :n].to(torch.int32), "lengths": torch.tensor([n - 2], dtype=torch.int32)}
    example = Example(attention, attention_reference.attention, arguments, ("qkv",))
    tiles = tiles | {"fwd": numbers(forward, "BT", "BS", "BE")}
    fits = forward.constants["ONE_TILE"] == (n <= forward.constants["BS"])  # float32's tile for any length also serves short ones, compiled for one
    names = tuple(case.name for case in ((forward, *backward) if fits else backward))
    return Work(f"attention {configuration}, {n} tokens", example, dtype_of(forward, "p_qkv"), names, tiles, pair)


def cls_works(cases: list[CompileCase]) -> Iterator[Work]:
    """Forward and backward of a width together; `many` tiles of tokens, or one."""
    for case in cases:
        if case.name.split("/")[1] != "fwd":
            continue
        BT, width = case.constants["BT"], case.constants["D"]
        tokens = BT - 3 if case.constants["ONE_TILE"] else 2 * BT + 5
        arguments = {"q": random(1, case.constants["P"], 1, width), "kv": random(1, tokens, 2, 1, width)}
        example = Example(cls_attention, cls_reference.cls_attention, arguments, ("q", "kv"))
        names = [case.name, case.name.replace("/fwd/", "/bwd/")] + (["cls_attention/row"] if tokens > 128 else [])
        tile = dict.fromkeys(("fwd", "bwd"), (BT, case.num_warps))
        yield Work(case.name.replace("/fwd/", " "), example, dtype_of(case, "p_q"), tuple(names), tile)


# ---- rows and GEMMs


def norm_works(cases: list[CompileCase]) -> Iterator[Work]:
    for case in cases:
        if case.name.split("/")[1] != "fwd":
            continue
        BR, BD = case.constants["BR"], case.constants["BD"]
        d = BD - BD // 4
        arguments = {"x": random(BR + 1, d), "weight": random(d), "bias": random(d), "eps": 1e-6, "residual": random(BR + 1, d)}
        example = Example(layer_norm, norm_reference.layer_norm, arguments, ("x", "residual"))
        tile = dict.fromkeys(("fwd", "bwd"), (BR, case.num_warps))
        yield Work(case.name.replace("/fwd/", " "), example, dtype_of(case, "p_x"), (case.name, case.name.replace("/fwd/", "/bwd/")), tile)


def sizes_of(case: CompileCase) -> tuple[int, int, int]:
    """Rows, columns and contraction of one block whose edges are masked; the contraction goes round the stages."""
    BM, BN, BK = (case.constants[name] for name in ("BM", "BN", "BK"))
    return BM - 3, BN - 16, BK * (case.num_stages + 2)


def gelu_works(cases: list[CompileCase]) -> Iterator[Work]:
    for case in cases:
        kernel = case.name.split("/")[1]
        rows, columns, depth = sizes_of(case)
        k, m = (depth, columns) if kernel == "fwd" else (columns, depth)
        arguments = {"x": random(rows, k), "weight": random(m, k) * k**-0.5, "bias": random(m)}
        arguments["activation"] = case.constants.get("ACTIVATION", "gelu")  # backward reads the derivative that forward saved
        tile = {f"{kernel}/": numbers(case, "BM", "BN", "BK")}
        inputs = ("x",) if kernel == "bwd" else ()
        example = Example(linear_gelu if inputs else forward_gelu, gelu_reference.linear_gelu, arguments, inputs)
        yield Work(case.name, example, dtype_of(case, "p_w"), (case.name,), tile)


def forward_gelu(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """y with the derivative saved, as before a backward."""
    return dispatch.call("linear_gelu", "forward", x, weight, bias, activation, True)[0]


def residual_works(cases: list[CompileCase]) -> Iterator[Work]:
    for case in cases:
        rows, columns, depth = sizes_of(case)
        tile = {case.name.split("/")[1] + "/": numbers(case, "BM", "BN", "BK")}
        if "/fwd/" in case.name:
            arguments = {"x": random(rows, depth), "weight": random(columns, depth) * depth**-0.5, "bias": random(columns)}
            arguments |= {"residual": random(rows, columns), "gamma": random(columns)}
            example = Example(linear_residual, residual_reference.linear_residual, arguments)
        else:
            arguments = {"grad_y": random(rows, depth), "weight": random(depth, columns) * depth**-0.5, "gamma": random(depth)}
            arguments |= {"slope": random(rows, columns)}
            example = Example(backward_gelu, backward_gelu_reference, arguments)
        yield Work(case.name, example, dtype_of(case, "p_w"), (case.name,), tile)


def backward_gelu(grad_y: Tensor, weight: Tensor, gamma: Tensor, slope: Tensor) -> Tensor:
    """As the engine calls it."""
    return dispatch.call("linear_residual", "backward_gelu", grad_y, weight, gamma, slope)


def backward_gelu_reference(grad_y: Tensor, weight: Tensor, gamma: Tensor, slope: Tensor) -> Tensor:
    """Gradient of h where x = f(h) and slope = f'(h), in the precision of the arguments."""
    return ((grad_y * gamma) @ weight) * slope


# ---- images


def embed_works(cases: list[CompileCase]) -> Iterator[Work]:
    """Images stay float32 under 16-bit weights, as in an inversion."""
    for case in cases:
        kernel = case.name.split("/")[1]
        constants, patch_size = case.constants, case.constants["PATCH"]
        n, d, pixels = constants["BT"] - 5, constants["BD"] - 16 if kernel == "fwd" else constants["BD"] * 2, 3 * patch_size**2
        cells = (constants["HEIGHT"] // patch_size) ** 2
        arguments = {
            "images": random(1, 3, constants["HEIGHT"], constants["WIDTH"]), "index": torch.rand(1, cells).argsort(1)[:, :n].to(torch.int32),
            "weight": random(d, pixels) * pixels**-0.5, "bias": random(d), "position": random(cells, d), "prefix": random(1, d),
            "augmentation": torch.tensor([-13, 22, 1], dtype=torch.int32), "patch_size": patch_size,
        }  # fmt: skip
        example = Example(embed_float32_images, embed_reference.patch_embed, arguments, ("images",) if kernel == "bwd" else ())
        tile = {kernel: numbers(case, "BT", "BD", "BK")}
        yield Work(case.name, example, dtype_of(case, "p_weight"), (case.name,), tile)


def embed_float32_images(images: Tensor, **arguments) -> Tensor:
    return patch_embed(images.float(), **arguments)


def step_works(cases: list[CompileCase]) -> Iterator[Work]:
    for case in cases:
        kernel, name = case.name.split("/")[1:]
        if kernel == "adam":
            yield step_work(case, name)
    example = Example(tv_norms, step_reference.tv_norms, {"images": random(1, 3, 224, 224)}, ("images",))
    yield Work("image_step norms", example, torch.float32, tuple(case.name for case in cases if case.name.split("/")[1].startswith("tv_")))


def step_work(case: CompileCase, name: str) -> Work:
    """One step on a few patches, or on the whole image."""
    patch_size = case.constants["PATCH"]
    images, grad, moment = random(3, 1, 3, 224, 224).unbind()
    arguments = {
        "images": images, "grad": grad, "exp_avg": moment, "exp_avg_sq": grad.square(), "step": torch.tensor(100, dtype=torch.int32),
        "low": torch.full((3,), -2.0), "high": torch.full((3,), 2.0), "patch_size": patch_size, "norms": step_reference.tv_norms(images),
        "tv_weight": 1e-4,
    }  # fmt: skip
    if case.constants["USE_INDEX"]:
        arguments["index"] = torch.rand(1, (224 // patch_size) ** 2).argsort(1)[:, :5].to(torch.int32)
    example = Example(image_step, step_reference.image_step, arguments, mutated=("images", "exp_avg", "exp_avg_sq"))
    return Work(f"image_step {name}", example, torch.float32, (case.name, case.name.replace("/adam/", "/copy/")))


WORKS = {
    "patch_embed": embed_works, "attention": attention_works, "cls_attention": cls_works, "layer_norm": norm_works, "linear_gelu": gelu_works,
    "linear_residual": residual_works, "image_step": step_works,
}  # fmt: skip


def works(operation: str, cases: list[CompileCase]) -> list[Work]:
    """What executes each of an operation's compile cases for one architecture. The same numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(WORKS[operation](cases))
