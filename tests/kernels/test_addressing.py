"""Tensors of more than 2^31 elements: Triton kernels find the last image of them.

Memory that nobody touches costs nothing, so such tensors are cheap as long as only their last images are written and read: the interpreter runs the
programs of the last image alone. A 32-bit offset wraps around, and reads or writes elsewhere: mostly where nothing is, which ends the process.
"""

import inspect

import pytest
import torch
from torch import Tensor

from smi.kernels import versions

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter runs some programs of a launch and not the others")


def enlarged(x: Tensor, batch: int) -> Tensor:
    """`batch` images, the last of which are those of x and the others whatever is in memory."""
    large = x.new_empty(batch, *x.shape[1:])
    large[-x.shape[0] :] = x
    return large


def run_last_image(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """From now on a launch runs the programs of the last of `batch` images, or its last program where one takes several images."""
    from triton.runtime import interpreter

    def launch(self, *args, **kwargs):
        known = {name: value for name, value in kwargs.items() if name in inspect.signature(self.fn).parameters}
        given = inspect.getcallargs(self.fn, *args, **known)
        converted = {name: x if name in self.constexprs else interpreter._implicit_cvt(x) for name, x in given.items()}
        columns, rows, layers = (*self.grid, 1, 1)[:3]
        programs = columns * rows * layers
        patches = interpreter._patch_lang(self.fn)
        try:
            interpreter.interpreter_builder.set_grid_dim(columns, rows, layers)
            for i in range(programs - max(programs // batch, 1), programs):
                interpreter.interpreter_builder.set_grid_idx(i % columns, i // columns % rows, i // columns // rows)
                self.fn(**converted)
        finally:
            patches.restore()

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)


def numbers(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype)


def attention(n: int) -> dict[str, tuple]:
    """Forward and backward for n tokens: name: (arguments of the small case, which of them have images)."""
    qkv, grad = numbers(2, n, 3, 1, 16), numbers(2, n, 16)
    out, lse = versions.load("attention", "triton").forward(qkv, None, None, 0.25)
    return {"forward": ([qkv, None, None, 0.25], [0]), "backward": ([grad, qkv, None, None, out, lse, 0.25], [0, 1, 4, 5])}


def cls_attention() -> dict[str, tuple]:
    q, kv = numbers(2, 1, 2, 16), numbers(2, 3, 2, 2, 16)
    out, row, weights = versions.load("cls_attention", "triton").forward(q, kv, 0.25)
    backward = [torch.randn_like(out), torch.randn_like(row), q, kv, weights, 0.25]
    return {"forward": ([q, kv, 0.25], [0, 1]), "backward": (backward, [0, 1, 2, 3, 4])}


def layer_norm() -> dict[str, tuple]:
    x, residual, weight, bias = numbers(128, 64), numbers(128, 64), numbers(64), numbers(64)
    _, s, mean, rstd = versions.load("layer_norm", "triton").forward(x, weight, bias, 1e-6, residual)
    backward = [numbers(128, 64), numbers(128, 64), s, weight, mean, rstd, 1e-6]
    return {"forward": ([x, weight, bias, 1e-6, residual], [0, 4]), "backward": (backward, [0, 1, 2, 4, 5])}


def linear_gelu() -> dict[str, tuple]:
    x, weight, bias = numbers(128, 64), numbers(64, 64) / 8, numbers(64)
    _, slope = versions.load("linear_gelu", "triton").forward(x, weight, bias, "gelu", True)
    return {"forward": ([x, weight, bias, "gelu", True], [0]), "backward": ([numbers(128, 64), slope, weight], [0, 1])}


def linear_residual() -> dict[str, tuple]:
    x, weight, bias, residual, gamma = numbers(128, 64), numbers(64, 64) / 8, numbers(64), numbers(128, 64), numbers(64)
    backward = [numbers(128, 64), weight, gamma, numbers(128, 64)]
    return {"forward": ([x, weight, bias, residual, gamma], [0, 3]), "backward_gelu": (backward, [0, 3])}


def patch_embed() -> dict[str, tuple]:
    images, index = numbers(128, 1, 4, 8), torch.stack([torch.randperm(2) for _ in range(128)]).int()
    weight, shift = numbers(16, 16) / 4, torch.tensor([1, 3, 1])
    forward = [images, index, weight, numbers(16), numbers(2, 16), None, shift, 4]
    return {"forward": (forward, [0, 1]), "backward": ([numbers(128, 2, 16), index, weight, shift, 4, 0, 4, 8, torch.float16], [0, 1])}


def image_step() -> dict[str, tuple]:
    images, grad, moment, square, out = (numbers(2, 1, 256, 256, dtype=torch.float32) for _ in range(5))
    step, low, high, norms = torch.tensor(3, dtype=torch.int32), torch.tensor([-2.0]), torch.tensor([2.0]), torch.rand(4) + 1
    forward = [images, grad, moment, square.abs(), step, low, high, None, 16, norms, 0.1, 0.1, 0.5, 0.99, 1e-8, out]
    return {"forward": (forward, [0, 1, 2, 3, 15]), "tv_norms_backward": ([images, norms, torch.rand(4)], [0])}


# Makers, and elements of an image in the smallest of the tensors that shall pass 2^31.
CASES = {
    "attention": (lambda: attention(2), 32),
    "attention pair": (lambda: attention(257), 257 * 16),
    "cls_attention": (cls_attention, 192),
    "layer_norm": (layer_norm, 64),
    "linear_gelu": (linear_gelu, 64),
    "linear_residual": (linear_residual, 64),
    "patch_embed": (patch_embed, 32),
    "image_step": (image_step, 256 * 256),
}
FUNCTIONS = dict.fromkeys(CASES, ("forward", "backward"))
FUNCTIONS |= {"linear_residual": ("forward", "backward_gelu"), "image_step": ("forward", "tv_norms_backward")}


@pytest.mark.parametrize(("case", "function"), [(case, function) for case, functions in FUNCTIONS.items() for function in functions])
def test_the_last_image_is_found(case, function, monkeypatch):
    make, elements = CASES[case]
    small, batched = make()[function]
    run = getattr(versions.load(case.split()[0], "triton"), function)
    images = small[batched[0]].shape[0]
    batch = (2**31 // elements // images + 1) * images
    torch.use_deterministic_algorithms(False)  # which fills memory; the fixture of all tests restores it
    try:
        large = [enlarged(x, batch) if i in batched else x for i, x in enumerate(small)]
        expected = run(*small)
        with monkeypatch.context() as patch:
            run_last_image(patch, batch)
            found = run(*large)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        pytest.skip("this machine does not promise memory that it may not have")
    if found is None:  # it writes to its arguments
        expected, found = ([given[i] for i in batched] for given in (small, large))
    pairs = zip(*([x] if isinstance(x, Tensor) else x for x in (expected, found)), strict=True)
    for truth, value in pairs:
        torch.testing.assert_close(value[-1], truth[-1])
