import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from smi.kernels import versions
from smi.kernels.attention import attention, stock
from smi.kernels.attention.reference import attention as definition
from tests.kernels import checks

TOKENS = (1, 2, 29, 47, 48, 50, 99, 148, 197, 257, 577)
WIDTHS = (16, 32, 64, 72, 80, 128)
OPTIONS = ((), ("index",), ("lengths",), ("index", "lengths"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments(n=29, width=16, options=(), batch=2, heads=2, integers=torch.int32, device="cpu"):
    """n tokens to attend among; with an index they are rows of a longer buffer, in no order; with lengths one image is short and one full."""
    rows = n + 5 if "index" in options else n
    index = torch.stack([torch.randperm(rows)[:n] for _ in range(batch)]).to(integers)
    lengths = torch.randint(1, n + 1, (batch,)).to(integers)
    lengths[-1] = n
    return {
        "qkv": torch.randn(batch, rows, 3, heads, width, dtype=torch.float64).to(device),
        "index": index.to(device) if "index" in options else None,
        "lengths": lengths.to(device) if "lengths" in options else None,
    }


def check(version, given, dtype):
    return checks.check_version(version, attention, definition, given, ("qkv",), dtype)


def outcome_of(version, given, dtype):
    given = checks.cast(given, dtype)
    with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
        ones = (torch.ones((), dtype=dtype, device=given["qkv"].device).expand(attention(**given).shape),)
        return checks.run(attention, given, ("qkv",), ones)


def slow(n):
    return [pytest.mark.slow] if n > 256 else []


def cases():
    """Every count of tokens with every option, widths in turn, so that every width meets every option and short and long sequences."""
    for i, n in enumerate(TOKENS):
        for j, options in enumerate(OPTIONS):
            width = WIDTHS[(i + 2 * j + i * j) % len(WIDTHS)]
            yield pytest.param(n, width, options, id=f"{n}-{width}-{'-'.join(options) or 'plain'}", marks=slow(n))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", [pytest.param(n, marks=slow(n)) for n in TOKENS])
def test_triton(n, width, options, device):
    check("triton", arguments(n, width, options, heads=1 if n > 64 else 2, device=device), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_longest(dtype, device):
    check("triton", arguments(1025, 16, ("index", "lengths"), batch=1, heads=1, device=device), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width"), [(1, width) for width in WIDTHS] + [(29, 64)])
def test_a_token_alone_has_the_weight_one(n, width, dtype, device):
    """Whatever its score is rounded to: the rule allows no error where PyTorch makes none. Alone in its image, too."""
    for _ in range(8):
        given = arguments(n, width, ("index",), batch=1, heads=1, device=device)
        check("triton", given | {"lengths": torch.ones(1, dtype=torch.int32, device=device)}, dtype)


def test_float32_weights_are_divided_by_their_own_sum(device):
    """In one pass. What lse was rounded to would otherwise be an error of all weights of a query, which does not average out over few tokens."""
    kernel = versions.load("attention", "triton")
    qkv = torch.randn(2, 29, 3, 2, 32, device=device)
    out, lse = kernel.forward(qkv, None, None, 0.2)
    grad = torch.randn_like(out)
    exact, shifted = (kernel.backward(grad, qkv, None, None, out, lse + shift, 0.2) for shift in (0, 1e-3))
    torch.testing.assert_close(shifted, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "width"), [(1, 64), (29, 64), (47, 72), (99, 64), (148, 64), (169, 32), (197, 64), (130, 128)])
def test_triton_in_16_bits(n, width, dtype, device):
    check("triton", arguments(n, width, ("index", "lengths"), heads=1, device=device), dtype)


@pytest.mark.parametrize(("n", "width", "options"), list(cases()))
def test_cpu(n, width, options):
    check("cpu", arguments(n, width, options), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "width"), [(1, 64), (2, 16), (17, 20), (29, 64), (33, 33), (47, 64), (48, 80), (96, 48), (97, 80), (148, 64)])
@pytest.mark.parametrize("options", OPTIONS)
def test_cpu_in_16_bits(n, width, options, dtype):
    check("cpu", arguments(n, width, options), dtype)


@pytest.mark.parametrize(("n", "width", "options"), list(cases()))
def test_stock(n, width, options, device):
    check("stock", arguments(n, width, options, device=device), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "width"), [(1, 64), (29, 64), (47, 72), (148, 64), (33, 20)])
@pytest.mark.parametrize("options", OPTIONS)
def test_stock_in_16_bits(n, width, options, dtype, device):
    check("stock", arguments(n, width, options, device=device), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_stock_by_batched_products(options, dtype, monkeypatch, device):
    """What it does where PyTorch has no fused kernel: an older GPU, for example."""
    monkeypatch.setattr(stock, "choose", lambda *args: stock.GEMMS)
    check("stock", arguments(47, 24, options, device=device), dtype)


@pytest.mark.parametrize("options", OPTIONS)
def test_stock_in_float64(options, device):
    """On a GPU, too, where PyTorch has no fused kernel for it."""
    given = arguments(21, 20, options, device=device)
    truth, found = (outcome_of(version, given, torch.float64) for version in ("reference", "stock"))
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("kernels", "bias"), [(stock.FLASH, False), (stock.EFFICIENT, False), (stock.EFFICIENT, True)])
def test_fused_kernels_for_gpus_are_called_as_pytorch_declares_them(kernels, bias):
    """Without a GPU: on meta tensors, which go through PyTorch's own checks of arguments and shapes."""
    q, k, v = torch.empty(2, 29, 3, 4, 64, device="meta", dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    bias = stock.bias_of(torch.empty(2, 29, device="meta", dtype=torch.bool), q) if bias else None
    out, lse = kernels.forward(q, k, v, bias, 0.125)
    assert (out.shape, lse.shape[:2], lse.dtype) == (q.shape, (2, 4), torch.float32)
    gradients = kernels.backward(out, q, k, v, bias, out, lse[..., :29], 0.125)
    assert [x.shape for x in gradients] == [q.shape] * 3


def test_reference_is_scaled_dot_product_attention():
    given = arguments(n=13, width=8, options=("index", "lengths"), batch=3)
    out = definition(**given, scale=0.3)
    for b, (rows, length) in enumerate(zip(given["index"].long(), given["lengths"], strict=True)):
        q, k, v = given["qkv"][b, rows[:length]].permute(1, 2, 0, 3)
        want = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(0, 1).flatten(1)
        torch.testing.assert_close(out[b, :length], want)
        assert not out[b, length:].any()


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    given = arguments(n=4, width=3, options=options)
    qkv = given.pop("qkv").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: definition(x, **given), qkv)
    with versions.forced("reference"), torch.autograd.set_multithreading_enabled(False):
        assert torch.autograd.gradcheck(lambda x: attention(x, **given), qkv)


@pytest.mark.parametrize("version", ["reference", "stock", "cpu", "triton"])
def test_scale_and_64_bit_integers(version, device):
    given = arguments(n=29, options=("index", "lengths"), integers=torch.int64, device=device)
    checks.check_version(version, attention, definition, given | {"scale": -0.7}, ("qkv",), torch.float32)


@pytest.mark.parametrize("version", ["reference", "stock", "cpu", "triton"])
def test_non_contiguous(version, device):
    """Images in the middle, head elements apart, and heads beside a narrower part: strides are followed or the tensor copied, never misread."""
    given = arguments(n=19, batch=3, device=device)
    qkv = given["qkv"]
    layouts = (
        qkv.transpose(0, 1).contiguous().transpose(0, 1),
        qkv.transpose(3, 4).contiguous().transpose(3, 4),
        torch.cat([qkv, qkv], -1)[..., 3:19],
    )
    for layout in layouts:
        assert not layout.is_contiguous()
        check(version, given | {"qkv": layout}, torch.float32)


@pytest.mark.parametrize("version", ["stock", "cpu", "triton"])
@pytest.mark.parametrize("n", [37, pytest.param(270, marks=pytest.mark.slow)])
def test_rows_past_a_length_are_neither_read_nor_given_a_gradient(version, n, device):
    given = checks.cast(arguments(n, 16, ("index", "lengths"), heads=1, device=device), torch.float32)
    given["lengths"][0] = n // 2
    named = torch.zeros(given["qkv"].shape[:2], dtype=torch.bool, device=device)
    for b, length in enumerate(given["lengths"]):
        named[b, given["index"][b, :length].long()] = True
    weight = (torch.randn(2, n, 16, device=device),)
    with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
        found = checks.run(attention, given, ("qkv",), weight)
        assert not found["out0"][0, n // 2 :].any()
        assert not found["d_qkv"][~named].any()
        holes = given | {"qkv": given["qkv"].masked_fill(~named[..., None, None, None], float("nan"))}
        with_holes = checks.run(attention, holes, ("qkv",), weight)
        assert all(torch.equal(with_holes[name], value) for name, value in found.items())


@pytest.mark.parametrize("version", ["stock", "cpu", "triton"])
@pytest.mark.parametrize("n", [47, pytest.param(260, marks=pytest.mark.slow)])
def test_repeats_bit_for_bit(version, n, device):
    given = checks.cast(arguments(n, 16, ("index", "lengths"), heads=1, device=device), torch.bfloat16)
    weight = (torch.randn(2, n, 16, device=device),)
    with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
        first, second = (checks.run(attention, given, ("qkv",), weight) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("n", [21, pytest.param(260, marks=pytest.mark.slow)])
def test_any_backward_continues_any_forward(n, device):
    given = checks.cast(arguments(n, 16, ("index", "lengths"), heads=1, device=device), torch.float32)
    qkv, index, lengths = given.values()
    grad = torch.randn(2, n, 16, device=device)
    names = ["reference", "stock", "triton"] + (["cpu"] if device == "cpu" else [])
    results = {v: versions.load("attention", v).forward(qkv, index, lengths, 0.25) for v in names}
    want = versions.load("attention", "reference").backward(grad, qkv, index, lengths, *results["reference"], 0.25)
    for after in names:
        for before in names:
            got = versions.load("attention", after).backward(grad, qkv, index, lengths, *results[before], 0.25)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda m: f"{after} after {before}: {m}")  # noqa: B023


def test_large_scores_do_not_overflow(device):
    """Scores of some thousands: the maximum must come off before the exponential, in the forward and in the recomputation."""
    given = arguments(40, 16, ("lengths",), heads=1, device=device)
    given["qkv"][:, :, :2] *= 40
    for version in ("stock", "cpu", "triton") if device == "cpu" else ("stock", "triton"):
        out = outcome_of(version, given, torch.float32)
        truth = outcome_of("reference", given, torch.float64)
        torch.testing.assert_close(out["out0"].double(), truth["out0"], rtol=1e-3, atol=1e-3)
        assert all(value.isfinite().all() for value in out.values())


def test_empty_batch(device):
    for version in ("reference", "stock", "cpu", "triton") if device == "cpu" else ("reference", "stock", "triton"):
        with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
            qkv = torch.randn(0, 5, 3, 2, 16, device=device, requires_grad=True)
            out = attention(qkv)
            out.sum().backward()
        assert out.shape == (0, 5, 32)
        assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck(options, device):
    given = checks.cast(arguments(n=9, options=options, device=device), torch.float32)
    given["qkv"].requires_grad_()
    opcheck(torch.ops.smi.attention.default, (*given.values(), 0.25))


def test_compiles_without_a_break():
    given = checks.cast(arguments(options=("index", "lengths")), torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    weight = (torch.randn(2, 29, 32),)
    got, want = (checks.run(function, given, ("qkv",), weight) for function in (compiled, attention))
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_wide_heads_are_left_to_others():
    with versions.forced("triton"), pytest.raises(versions.BackendUnavailable, match="160 wide"):
        attention(torch.randn(1, 4, 3, 1, 160))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.ones(2, 34, 2, 2, 16)}, "qkv must be"),
        ({"qkv": torch.ones(2, 34, 3, 2, 16, dtype=torch.int32)}, "floating point"),
        ({"qkv": torch.ones(2, 0, 3, 2, 16)}, "at least one token"),
        ({"index": torch.zeros(2, 29)}, "index must be"),
        ({"index": torch.zeros(3, 29, dtype=torch.int32)}, "index must be"),
        ({"index": torch.zeros(2, 35, dtype=torch.int32)}, "n <= 34"),
        ({"lengths": torch.ones(3, dtype=torch.int32)}, "lengths must be"),
        ({"lengths": torch.ones(2)}, "lengths must be"),
        ({"lengths": torch.ones(2, dtype=torch.int32, device="meta")}, "lengths must be on"),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_refusals(change, message, gradient):
    given = checks.cast(arguments(options=("index", "lengths")), torch.float32) | change
    given["qkv"].requires_grad_(gradient and given["qkv"].is_floating_point())
    with pytest.raises(ValueError, match=message):
        attention(**given)


def test_nan_in_a_query_is_seen():
    given = checks.cast(arguments(9, 16, heads=1), torch.float32)
    given["qkv"][0, 4, 0] = float("nan")
    with versions.forced("cpu"):
        out = attention(given["qkv"])
    assert out[0, 4].isnan().all()
    assert not out[0, :4].isnan().any()
