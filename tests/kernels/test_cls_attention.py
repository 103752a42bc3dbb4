import pytest
import torch
from torch.library import opcheck

from smi.kernels import versions
from smi.kernels.cls_attention import cls_attention
from smi.kernels.cls_attention.reference import cls_attention as definition
from tests.kernels import checks

TOKENS = (1, 2, 29, 47, 48, 50, 99, 148, 197, 257, 577)
WIDTHS = (16, 32, 64, 72, 80, 128)
INPUTS = ("q", "kv")


def arguments(tokens=29, width=16, queries=1, batch=2, heads=3, device="cpu"):
    def random(*shape):
        return torch.randn(*shape, heads, width, dtype=torch.float64, device=device)

    return {"q": random(batch, queries), "kv": random(batch, tokens, 2)}


def check(version, given, dtype=torch.float32):
    return checks.check_version(version, cls_attention, definition, given, INPUTS, dtype)


SIZES = [(n, WIDTHS[(i + j) % 6], queries) for i, n in enumerate(TOKENS) for j, queries in enumerate((1, 2, 5))]


@pytest.mark.parametrize(("tokens", "width", "queries"), SIZES)
def test_triton(tokens, width, queries, device):
    check("triton", arguments(tokens, width, queries, batch=1 if tokens > 64 else 2, heads=2, device=device))


@pytest.mark.parametrize(("tokens", "width", "queries"), SIZES)
def test_stock(tokens, width, queries, device):
    check("stock", arguments(tokens, width, queries, device=device))


@pytest.mark.parametrize(("tokens", "width", "queries"), [*SIZES, (47, 3, 1), (13, 20, 2)])
def test_cpu(tokens, width, queries):
    check("cpu", arguments(tokens, width, queries))


def test_stock_in_float64(device):
    given = arguments(21, 20, 2, device=device)
    weights = (torch.randn(2, 2, 60, device=device), torch.randn(2, 21, device=device))
    with torch.autograd.set_multithreading_enabled(False), versions.forced("stock"):
        found = checks.run(cls_attention, given, INPUTS, weights)
    for name, value in checks.run(definition, given, INPUTS, weights).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(47, 64), (99, 72), (130, 128)])
@pytest.mark.parametrize("version", checks.VERSIONS)
def test_in_16_bits(version, tokens, width, dtype, device):
    checks.needs(version, dtype, torch.float32, torch.bfloat16)
    check(version, arguments(tokens, width, 2, device=device), dtype)


def test_reference_is_attention_of_those_queries():
    given = arguments(queries=3)
    q, kv = given["q"].transpose(1, 2), given["kv"].permute(2, 0, 3, 1, 4)
    out, row = definition(**given)
    want = torch.nn.functional.scaled_dot_product_attention(q, *kv).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(row.sum(1), torch.ones(2, dtype=torch.float64))
    ones = kv[0] @ q[:, :, :1].transpose(-1, -2) / 4
    torch.testing.assert_close(row, ones.softmax(2).mean(1)[..., 0])


@pytest.mark.parametrize("queries", [1, 3])
def test_gradcheck(queries):
    given = {name: x.requires_grad_() for name, x in arguments(5, 3, queries, heads=2).items()}
    assert torch.autograd.gradcheck(definition, tuple(given.values()))
    with versions.forced("reference"), torch.autograd.set_multithreading_enabled(False):
        assert torch.autograd.gradcheck(cls_attention, tuple(given.values()))


@pytest.mark.parametrize("version", checks.VERSIONS)
@pytest.mark.parametrize("picked", [0, 1])
@pytest.mark.parametrize("tokens", [29, 300])
def test_a_loss_of_one_result(version, picked, tokens, device):
    given = checks.cast(arguments(tokens, queries=2, heads=2, device=device), torch.float32)
    shape = (2, 2, 32) if picked == 0 else (2, tokens)
    weight = (torch.randn(shape, device=device, dtype=torch.float64),)
    truth = checks.run(lambda **kw: definition(**kw)[picked], checks.cast(given, torch.float64), INPUTS, weight)
    with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
        got = checks.run(lambda **kw: cls_attention(**kw)[picked], given, INPUTS, weight)
    for name, value in truth.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", checks.VERSIONS)
def test_non_contiguous_and_scale(version, device):
    """Queries and keys as they lie in packed qkv, and with elements apart."""
    qkv = torch.randn(2, 31, 3, 2, 16, dtype=torch.float64, device=device)
    given = {"q": qkv[:, :2, 0], "kv": qkv[:, :, 1:], "scale": -0.6}
    check(version, given)
    apart = {name: x.transpose(-1, -2).contiguous().transpose(-1, -2) for name, x in arguments(device=device).items()}
    assert not apart["kv"].is_contiguous()
    check(version, apart)


@pytest.mark.parametrize("tokens", [47, 197])
def test_repeats_bit_for_bit(tokens, device):
    given = checks.cast(arguments(tokens, 64, 2, device=device), torch.bfloat16)
    weights = (torch.randn(2, 2, 192, device=device), torch.randn(2, tokens, device=device))
    with versions.forced("triton"), torch.autograd.set_multithreading_enabled(False):
        first, second = (checks.run(cls_attention, given, INPUTS, weights) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("tokens", [21, 300])
def test_any_backward_continues_any_forward(tokens, device):
    q, kv = checks.cast(arguments(tokens, queries=2, device=device), torch.float32).values()
    grad, grad_row = torch.randn(2, 2, 48, device=device), torch.randn(2, tokens, device=device)
    modules = {v: versions.load("cls_attention", v) for v in checks.VERSIONS}
    kept = {v: module.forward(q, kv, 0.25) for v, module in modules.items()}
    want = modules["reference"].backward(grad, grad_row, q, kv, kept["reference"][2], 0.25)
    for module in modules.values():
        for _, _, weights in kept.values():
            for got, truth in zip(module.backward(grad, grad_row, q, kv, weights, 0.25), want, strict=True):
                torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", checks.VERSIONS)
def test_large_scores_do_not_overflow(version, device):
    given = arguments(300, 16, heads=1, device=device)
    given["q"] *= 1000
    with versions.forced(version):
        out, row = cls_attention(**checks.cast(given, torch.float32))
    assert out.isfinite().all()
    torch.testing.assert_close(row.sum(1), torch.ones(2, device=device))


def test_empty_batch(device):
    for version in checks.VERSIONS:
        with versions.forced(version):
            out, row = cls_attention(torch.randn(0, 1, 2, 16, device=device), torch.randn(0, 5, 2, 2, 16, device=device))
        assert (out.shape, row.shape) == ((0, 1, 32), (0, 5))


def test_opcheck(device):
    given = checks.cast(arguments(device=device), torch.float32)
    opcheck(torch.ops.smi.cls_attention.default, (*(x.requires_grad_() for x in given.values()), 0.25))


def test_compiles_without_a_break():
    given = checks.cast(arguments(), torch.float32)
    compiled = torch.compile(cls_attention, fullgraph=True, backend="aot_eager")
    weights = (torch.randn(2, 1, 48), torch.randn(2, 29))
    got, want = (checks.run(function, given, INPUTS, weights) for function in (compiled, cls_attention))
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_many_queries_are_left_to_attention():
    with versions.forced("triton"), pytest.raises(versions.BackendUnavailable, match="6 queries"):
        cls_attention(torch.randn(1, 6, 1, 16), torch.randn(1, 20, 2, 1, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 3, 16)}, "must be"),
        ({"q": torch.ones(2, 1, 3, 16, dtype=torch.int32)}, "must be"),
        ({"kv": torch.ones(2, 29, 3, 3, 16)}, "must be"),
        ({"kv": torch.ones(2, 29, 2, 4, 16)}, "agree in B, H and D"),
        ({"kv": torch.ones(2, 29, 2, 3, 16, dtype=torch.bfloat16)}, "dtype"),
        ({"kv": torch.ones(2, 0, 2, 3, 16)}, "at least one"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        cls_attention(**checks.cast(arguments(), torch.float32) | change)
