"""Attention on the CPU with its gradient in C++ (csrc/autograd), and the registered operation that it stands in for."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from smi.csrc import host
from smi.kernels import dispatch, versions
from smi.kernels.attention import attention
from tests.kernels import checks
from tests.kernels.test_attention import DTYPES, OPTIONS, arguments, check

pytestmark = pytest.mark.skipif(host.compiler() is None, reason="no C++ compiler")


class Watched(torch.Tensor):
    pass


def eager(given):
    return dispatch.differentiable("attention", given["qkv"].requires_grad_(), given["index"], given["lengths"], 0.25)


@pytest.fixture
def registered(monkeypatch):
    """The registered operation even where the CPU's own would run."""
    monkeypatch.setattr(dispatch, "differentiable", lambda *args: None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width"), [(1, 16), (47, 64), (80, 128), (81, 128), (99, 32)])
def test_cpu_through_the_registered_operation(n, width, dtype, registered):
    check("cpu", arguments(n, width, ("index", "lengths")), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("n", "width"), [(16, 16), (32, 32), (33, 32), (47, 64), (64, 64), (65, 64), (72, 72), (80, 128), (81, 128)])
def test_shares_or_lse_are_kept_without_a_difference(n, width, options, dtype):
    """Shares where rows of them, padded to 32, are no longer than a head's, up to 80 tokens; lse otherwise."""
    check("cpu", arguments(n, width, options), dtype)


def test_it_is_what_runs():
    given = checks.cast(arguments(9), torch.float32)
    assert eager(given) is torch.ops.smi.attention_eager.default
    assert "Attention" in attention(given["qkv"]).grad_fn.name()
    with torch.no_grad():
        assert eager(given) is None


@pytest.mark.parametrize("version", ["reference", "stock"])
def test_other_versions_have_none(version):
    with versions.forced(version):
        assert eager(checks.cast(arguments(9), torch.float32)) is None


@pytest.mark.parametrize("shape", [(2, 9, 3, 2), (2, 9, 2, 2, 16), (2, 0, 3, 2, 16)])
def test_called_by_itself_it_checks_what_it_reads(shape):
    run = host.operation("attention_eager")
    with pytest.raises(ValueError, match="qkv must be"):
        run(torch.ones(shape), None, None, None)
    with pytest.raises(ValueError, match="index integers"):
        run(torch.ones(2, 9, 3, 2, 16), torch.zeros(3, 4, dtype=torch.int64), None, None)


def test_float64_has_none():
    assert eager(arguments(9)) is None


def test_who_watches_operations_sees_the_registered_one():
    given = checks.cast(arguments(9), torch.float32)
    with FlopCounterMode(display=False):
        assert eager(given) is None
    with FakeTensorMode() as mode:
        assert attention(mode.from_tensor(given["qkv"])).shape == (2, 9, 32)
    seen = []
    torch.func.grad(lambda x: seen.append((x.requires_grad, dispatch.differentiable("attention", x, None, None, 0.25))) or x.sum())(given["qkv"])
    assert seen == [(True, None)]
    assert eager(given | {"qkv": torch._neg_view(given["qkv"].detach())}) is None
    assert "attention_eager" not in make_fx(lambda x: attention(x), pre_dispatch=True)(given["qkv"]).code
    assert eager(given | {"qkv": given["qkv"].as_subclass(Watched)}) is None


def test_compiled_it_is_the_registered_one():
    qkv = checks.cast(arguments(9), torch.float32)["qkv"].requires_grad_()
    graphs = []
    compiled = torch.compile(attention, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    torch.testing.assert_close(compiled(qkv), attention(qkv))
    assert "attention_eager" not in graphs[0].code


@pytest.mark.parametrize("n", [9, 29])
def test_with_a_graph_of_the_gradient_it_is_the_same_and_refuses_a_second(n):
    qkv = checks.cast(arguments(n), torch.float32)["qkv"].requires_grad_()
    (once,) = torch.autograd.grad(attention(qkv).square().sum(), qkv)
    (found,) = torch.autograd.grad(attention(qkv).square().sum(), qkv, create_graph=True)
    assert torch.equal(found, once)
    with pytest.raises(RuntimeError, match="once, not twice"):
        found.sum().backward()


@pytest.mark.parametrize("n", [9, 29])
def test_gradients_of_any_kind(n):
    """Batches of them, negated or zero without memory of their own: what PyTorch hands on where the dispatcher stands between."""
    qkv = checks.cast(arguments(n, 32), torch.float32)["qkv"].requires_grad_()
    out = attention(qkv)
    grads = torch.randn(3, *out.shape)
    want = torch.stack([torch.autograd.grad(out, qkv, grad, retain_graph=True)[0] for grad in grads])
    assert torch.equal(torch.autograd.grad(out, qkv, grads, is_grads_batched=True, retain_graph=True)[0], want)
    assert torch.equal(torch.autograd.grad(out, qkv, torch._neg_view(-grads[1]), retain_graph=True)[0], want[1])
    assert not torch.autograd.grad(out, qkv, torch._efficientzerotensor(out.shape), retain_graph=True)[0].any()


def test_what_is_changed_before_backward_is_refused():
    leaf = checks.cast(arguments(9), torch.float32)["qkv"].requires_grad_()
    qkv = leaf * 1
    out = attention(qkv)
    qkv.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_without_gradients():
    given = checks.cast(arguments(9, options=("index", "lengths")), torch.bfloat16)
    want = attention(**given | {"qkv": given["qkv"].clone().requires_grad_()})
    assert want.requires_grad
    run = host.operation("attention_eager")
    with torch.inference_mode():
        assert torch.equal(run(*given.values(), 16**-0.5), want)
    for function in (lambda: run(*given.values(), 16**-0.5), lambda: attention(**given)):
        out = function()
        assert torch.equal(out, want)
        assert not out.requires_grad


def test_nan_reaches_every_gradient_that_it_should():
    """NaN in one query of bfloat16, where shares are rounded: its own gradient and those of all keys and values, and no other query's."""
    qkv = checks.cast(arguments(9, 16, batch=1, heads=1), torch.bfloat16)["qkv"]
    qkv[0, 4, 0] = float("nan")
    attention(qkv.requires_grad_()).sum().backward()
    nan = qkv.grad.isnan()
    assert nan[0, 4, 0].all()
    assert nan[0, :, 1].all()
    assert nan[0, :, 2].all()
    assert not nan[0, [0, 1, 2, 3, 5, 6, 7, 8], 0].any()


def test_where_it_cannot_be_built_python_differentiates(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(host, "AUTOGRAD_FLAGS", ["-DNO", "--no-such-flag"])
    monkeypatch.setattr(host.AUTOGRAD, "loaded", None)
    monkeypatch.setattr(host.AUTOGRAD, "failure", None)
    host.operation.cache_clear()
    try:
        check("cpu", arguments(9), torch.float32)
        assert "Python's autograd runs instead" in capsys.readouterr().err
    finally:
        host.operation.cache_clear()
