"""Attention of bfloat16s on the CPU, whose products are of pairs of integers or bfloat16s where the processor is faster at them: numbers that those
represent badly."""

import pytest
import torch

from smi.csrc import host
from smi.kernels import dispatch, versions
from smi.kernels.attention import attention
from smi.kernels.attention.reference import attention as definition
from smi.kernels.precision import same_precision
from tests.kernels import checks
from tests.kernels.test_attention import arguments

pytestmark = pytest.mark.skipif(host.compiler() is None, reason="no C++ compiler")
SIZES = [(21, 16), (47, 64), (50, 80), (51, 72), (80, 128)]  # of tokens and width; 72 has no whole tiles, which integers need


def token(which, factor):
    def change(qkv, grad):
        qkv[:, 3, which] *= factor

    return change


def channel(which, factor):
    def change(qkv, grad):
        qkv[:, :, which, :, 5] *= factor

    return change


def all_of(which, factor):
    def change(qkv, grad):
        qkv[:, :, which] *= factor

    return change


def gradient(factor):
    def change(qkv, grad):
        grad *= factor

    return change


def one_gradient(qkv, grad):
    grad[:, :3] *= 1e-6


def alike(qkv, grad):
    """All rows along one and the same: the largest sums that there are."""
    lengths = torch.linspace(1, 1.1, qkv.shape[1], dtype=qkv.dtype)[:, None]
    qkv[:] = qkv[:, :1, :1] * lengths[..., None, None]
    grad[:] = grad[:, :1] * lengths


def far_from_zero(qkv, grad):
    qkv += 8


def ignored(which, factor):
    """Nobody attends token 3, of which `which` is larger than all others."""

    def change(qkv, grad):
        along = torch.nn.functional.normalize(torch.randn(qkv.shape[-1], dtype=qkv.dtype), dim=0)
        qkv[:, :, 0] += 6 * along
        qkv[:, 3, 1] = -3 * qkv.shape[-1] ** 0.5 * along
        qkv[:, 3, which] *= factor

    return change


def one_channel_each_way(qkv, grad):
    """What weights of values and of the output leave free: a channel of values a thousand times as large, its gradient as much smaller."""
    qkv[:, :, 2, :, 5] *= 1000
    grad.unflatten(2, qkv.shape[3:])[..., 5] /= 1000


def centred(qkv, grad):
    qkv[:, :, 2] -= qkv[:, :, 2].mean(1, keepdim=True)


def keys_in_two_places(qkv, grad):
    qkv[:, ::2, 1] += 40


def keys_and_their_opposites(qkv, grad):
    qkv[:, :, 1] += 50
    qkv[:, ::10, 1] *= -1


def constant(qkv, grad):
    """Queries and keys of equal numbers but for one, for which roundings add up."""
    varying = qkv[:, :, :2, :, 5].clone()
    qkv[:, :, :2] = (30 / qkv.shape[-1] ** 0.5) ** 0.5
    qkv[:, :, :2, :, 5] = varying


HARD = {
    "value ignored": [ignored(2, 1000)],
    "value ignored, larger": [ignored(2, 1e4)],
    "key ignored": [all_of(1, 0.12), ignored(1, 1)],
    "channel each way": [one_channel_each_way],
    "one query": [all_of(0, 0.04), token(0, 100)],
    "one query, larger": [all_of(0, 0.003), token(0, 1000)],
    "mean of centred values": [all_of(0, 0), centred],
    "constant": [constant],
    "channels of 100": [channel(0, 100), channel(1, 0.1), channel(2, 100)],
    "channel of values": [channel(2, 1e4)],
    "tokens of 30": [token(0, 30), token(2, 30)],
    "tokens of nothing": [token(0, 0), token(1, 0), token(2, 0)],
    "small tokens": [token(1, 1e-6), token(2, 1e-6), one_gradient],
    "sharp": [all_of(0, 12), all_of(1, 4)],
    "very sharp": [all_of(0, 60), all_of(1, 60)],
    "flat": [all_of(0, 1e-4)],
    "no queries": [all_of(0, 0)],
    "no values": [all_of(2, 0)],
    "no gradient": [gradient(0)],
    "tiny values": [all_of(2, 1e-12)],
    "tiny gradient": [gradient(1e-18)],
    "smaller values and gradient": [all_of(2, 1e-8), gradient(1e-8)],
    "small values and gradient": [all_of(2, 1e-6), gradient(1e-6)],
    "huge values": [all_of(2, 1e12)],
    "huge queries, tiny keys": [all_of(0, 1e14), all_of(1, 1e-14)],
    "alike": [alike],
    "far from zero": [far_from_zero],
    "keys in two places": [keys_in_two_places],
    "keys and their opposites": [keys_and_their_opposites],
}
AS_A_WHOLE = ("very sharp", "alike")  # the gradient of their queries is next to nothing


def outcome(function, qkv, grad):
    leaf = qkv.detach().clone().requires_grad_()
    out = function(leaf)
    (found,) = torch.autograd.grad(out, leaf, grad)
    return {"out": out.detach(), "dqkv": found} | {f"d{name}": found[:, :, j] for j, name in enumerate("qkv")}


@pytest.mark.parametrize("path", ["eager", "registered"])
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize(("n", "width"), SIZES)
def test_hard_numbers(n, width, case, path, monkeypatch):
    """The error rule for the output and each of the three gradients by itself."""
    if path == "registered":
        monkeypatch.setattr(dispatch, "differentiable", lambda *args: None)
    qkv, grad = arguments(n, width)["qkv"], torch.randn(2, n, 2 * width, dtype=torch.float64)
    for change in HARD[case]:
        change(qkv, grad)
    qkv, grad = qkv.bfloat16(), grad.bfloat16()
    truth = outcome(definition, qkv.double(), grad.double())
    with same_precision():
        plain = outcome(definition, qkv, grad)
    with versions.forced("cpu"), torch.autograd.set_multithreading_enabled(False):
        found = outcome(attention, qkv, grad)
    for name in ("out", "dqkv") if case in AS_A_WHOLE else found:
        checks.assert_close_enough(name, found[name], plain[name], truth[name])


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2, "grad"])
def test_what_is_no_number_spreads_as_in_the_definition(which, bad):
    qkv, grad = arguments(47, 64, batch=2, heads=3)["qkv"].bfloat16(), torch.randn(2, 47, 192).bfloat16()
    if which == "grad":
        grad[1, 4, 70] = bad
    else:
        qkv[1, 4, which, 1, 6] = bad
    with versions.forced("cpu"), torch.autograd.set_multithreading_enabled(False):
        found = outcome(attention, qkv, grad)
    want = outcome(definition, qkv.float(), grad.float())
    for name in found:
        assert torch.equal(found[name].isnan(), want[name].isnan()), name
    assert not found["dqkv"].isfinite().all()


def test_other_heads_do_not_notice():
    """A head whose numbers are refused goes its own way alone."""
    qkv, grad = arguments(47, 64, batch=2, heads=3)["qkv"].bfloat16(), torch.randn(2, 47, 192).bfloat16()
    plain = outcome(attention, qkv, grad)
    qkv[1, :, 2, 1] *= 2.0**60
    found = outcome(attention, qkv, grad)
    for name in ("dq", "dk", "dv"):
        assert torch.equal(found[name][:, :, [0, 2]], plain[name][:, :, [0, 2]])
        assert torch.equal(found[name][0], plain[name][0])


@pytest.mark.parametrize("width", [20, 64, 72])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_stays_in_its_head(which, width):
    """Its numbers lie right beside those of the others."""
    qkv, grad = arguments(47, width, batch=2, heads=3)["qkv"].bfloat16(), torch.randn(2, 47, 3 * width).bfloat16()
    qkv[0, :, which, 1] = float("nan")
    found = outcome(attention, qkv, grad)
    for name in ("dq", "dk", "dv"):
        assert found[name][:, :, [0, 2]].isfinite().all()
        assert found[name][1].isfinite().all()
    assert found["out"][0, :, :width].isfinite().all()
    assert found["out"][0, :, 2 * width :].isfinite().all()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX2", reason="integers are no faster on this processor")
@pytest.mark.parametrize(("n", "integers"), [(19, False), (20, True), (47, True), (80, True), (81, False)])
def test_integers_are_used(n, integers):
    """Scaling values by a power of two changes no bit of floats but leaves the range of integers."""
    qkv, grad = arguments(n, 64)["qkv"].bfloat16(), torch.randn(2, n, 128).bfloat16()
    out = outcome(attention, qkv, grad)["out"]
    qkv[:, :, 2] *= 2.0**60
    same = torch.equal(outcome(attention, qkv, grad)["out"] * 2.0**-60, out)
    assert same != integers


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor does not multiply bfloat16s")
@pytest.mark.parametrize("n", [8, 47, 96, 97, 197])
def test_bfloat16s_are_used(n):
    """An output of shares that were rounded to bfloat16 before they were multiplied."""
    q, k, v = torch.randn(3, n, 64).bfloat16().double()
    v[:] = v[:, :1]  # every column alike: what the sum of the rounded shares is off by is all of the error
    found = outcome(attention, torch.stack([q, k, v], 1)[None, :, :, None].bfloat16(), torch.zeros(1, n, 64).bfloat16())["out"][0]
    scores = q @ k.T / 8
    shares = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = (shares.bfloat16().double() @ v / shares.sum(-1, keepdim=True)).bfloat16()
    exact = (shares @ v / shares.sum(-1, keepdim=True)).bfloat16()
    assert (found == rounded).double().mean() > 0.97
    assert (rounded == exact).double().mean() < 0.9
