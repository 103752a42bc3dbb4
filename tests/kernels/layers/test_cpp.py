"""The packed linear layers of the CPU against the definitions, by the error rule, forward and backward, over sizes that leave parts of tiles."""

import pytest
import torch

from smi.csrc import host
from smi.kernels.layers.cpp import Linear, unsupported
from smi.kernels.linear_gelu.reference import ACTIVATIONS, linear_gelu
from smi.kernels.linear_residual.reference import linear_residual
from tests.kernels import checks

pytestmark = [pytest.mark.fast, pytest.mark.skipif(host.compiler() is None, reason="no C++ compiler")]
needs_bfloat16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor does not multiply bfloat16")
SIZES = [(1, 1, 1), (5, 7, 3), (47, 64, 64), (48, 257, 33), (99, 192, 130), (197, 768, 100), (13, 1100, 40), (300, 40, 17)]  # rows, k, m
EVEN = [(1, 2, 4), (5, 8, 6), (1, 32, 64), (16, 32, 32), (17, 64, 34), (47, 192, 192), (48, 258, 66), (197, 768, 100), (13, 1100, 40), (300, 40, 18)]
IN_DTYPES = [(torch.float32, *size) for size in SIZES] + [pytest.param(torch.bfloat16, *size, marks=needs_bfloat16) for size in EVEN]

NOT_TINY = [case for i, case in enumerate(IN_DTYPES) if i not in (0, len(SIZES))]  # of a number or two PyTorch's error may be none


def layer(dtype, rows, k, m, bias=True, gamma=True):
    x, residual, grad = torch.randn(rows, k), torch.randn(rows, m), torch.randn(rows, m)
    weight = torch.randn(m, k) * k**-0.5
    tensors = x, residual, grad, weight, torch.randn(m) if bias else None, torch.rand(m) + 0.5 if gamma else None
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def double(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


@pytest.mark.parametrize(("dtype", "rows", "k", "m"), IN_DTYPES)
@pytest.mark.parametrize("options", [True, False])
def test_residual_and_its_gradient(dtype, rows, k, m, options):
    x, residual, grad, weight, bias, gamma = layer(dtype, rows, k, m, options, options)
    linear = Linear(weight, bias, gamma)
    truth = linear_residual(*double(x, weight, bias, residual, gamma))
    checks.assert_close_enough("y", linear.forward_residual(x, residual), linear_residual(x, weight, bias, residual, gamma), truth)
    plain = linear.forward(x)
    checks.assert_close_enough("x W + b", plain, torch.nn.functional.linear(x, weight, bias), torch.nn.functional.linear(*double(x, weight, bias)))
    pulled, scale = grad if gamma is None else grad * gamma, 1 if gamma is None else gamma.double()
    checks.assert_close_enough("dx", linear.backward(grad), pulled @ weight, (grad.double() * scale) @ weight.double())


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("dtype", "rows", "k", "m"), NOT_TINY)
def test_activation_and_its_gradient(dtype, rows, k, m, activation):
    x, _, _, weight, bias, _ = layer(dtype, rows, k, m)
    y, kept = Linear(weight, bias).forward_activation(x, activation)
    checks.assert_close_enough("y", y, linear_gelu(x, weight, bias, activation), linear_gelu(*double(x, weight, bias), activation))

    assert torch.equal(kept, Linear(weight, bias).recompute_saved(x, activation))
    second, pull = (torch.randn(k, m) * m**-0.5).to(dtype), torch.randn(rows, k).to(dtype)

    def plain(x, weight, bias, second, pull):
        h = torch.nn.functional.linear(x, weight, bias).requires_grad_()
        (ACTIVATIONS[activation](h) @ second.T).backward(pull)
        return h.grad

    found, given = Linear(second).backward_activation(pull, kept, activation), (x, weight, bias, second, pull)
    checks.assert_close_enough("dh", found, plain(*given), plain(*double(*given)))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_far_out(activation):
    """Tails keep their digits, and neither end overflows."""
    h = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e4, -88.0, 88.0, 1e4])])[:, None]
    y, _ = Linear(torch.ones(1, 1)).forward_activation(h, activation)
    want = ACTIVATIONS[activation](h.double())
    if activation == "gelu":
        want = h.double() / 2 * torch.special.erfc(-h.double() / 2**0.5)  # F.gelu's 1 + erf cancels
    torch.testing.assert_close(y.double(), want, rtol=2e-5, atol=1e-30 if activation == "gelu" else 1e-9)


@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 300), *(pytest.param(torch.bfloat16, k, marks=needs_bfloat16) for k in (300, 320))])
def test_any_number_of_threads_gives_the_same(dtype, k):
    x, residual, _, weight, bias, gamma = layer(dtype, 100, k, 200)
    linear, before, results = Linear(weight, bias, gamma), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear.forward_residual(x, residual))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_cannot_be_packed_says_why():
    assert "float32 or bfloat16 on the CPU" in unsupported(torch.ones(2, 2, dtype=torch.float64))
    assert unsupported(torch.ones(2, 2)) is None


@needs_bfloat16
def test_bfloat16_is_multiplied_in_pairs():
    assert "2 x 3 is not even" in unsupported(torch.ones(2, 2).bfloat16(), torch.ones(2, 3).bfloat16())
    assert unsupported(torch.ones(2, 4).bfloat16()) is None


def test_a_processor_without_bfloat16_says_so(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert "does not multiply bfloat16" in unsupported(torch.ones(2, 2).bfloat16())


def test_without_a_compiler_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(host, "compiler", lambda: None)
    monkeypatch.setattr(host.CPU, "loaded", None)
    monkeypatch.setattr(host.CPU, "failure", None)
    assert "g++" in host.CPU.why_not()
    assert "g++" in unsupported(torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
def test_no_rows_and_nan(dtype):
    x, _, _, weight, bias, _ = layer(dtype, 3, 64, 18)
    linear = Linear(weight, bias)
    assert linear.forward(x[:0]).shape == (0, 18)
    x[1, 3] = float("nan")
    y, _ = linear.forward_activation(x, "gelu")
    assert y.isnan().any(1).tolist() == [False, True, False]


def test_other_defaults_of_torch_change_nothing():
    from smi.kernels.layers import cpp

    x, residual, _, weight, bias, gamma = layer(torch.float32, 9, 33, 33)
    want = [Linear(weight, bias, gamma).forward_residual(x, residual), cpp.Norm(bias, None, 1e-6).forward(x)[0]]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        got = [Linear(weight, bias, gamma).forward_residual(x, residual), cpp.Norm(bias, None, 1e-6).forward(x)[0]]
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
