import pytest
import torch
from torch.library import opcheck

from smi.kernels import versions
from smi.kernels.layer_norm import layer_norm
from smi.kernels.layer_norm.reference import layer_norm as definition
from tests.kernels import checks

pytestmark = pytest.mark.fast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments(rows=(3, 29), d=96, residual=True, bias=True, device="cpu"):
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=device)

    return {
        "x": random(*rows, d) + 1,
        "weight": random(d),
        "bias": random(d) if bias else None,
        "eps": 1e-6,
        "residual": random(*rows, d) if residual else None,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", checks.VERSIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_versions_meet_the_error_rule(version, residual, dtype, device):
    checks.needs(version, dtype, torch.float32, torch.bfloat16)
    inputs = ("x", "residual") if residual else ("x",)
    checks.check_version(version, layer_norm, definition, arguments(residual=residual, device=device), inputs, dtype)


SIZES = [((47,), 192), ((48,), 100), ((99,), 64), ((2, 197), 257), ((7,), 768), ((1,), 33), ((3,), 1025), ((2,), 5000)]


@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_odd_sizes(rows, d, device):
    checks.check_version("triton", layer_norm, definition, arguments(rows, d, device=device), ("x", "residual"), torch.float32)


def test_one_column_is_the_bias(device):
    with versions.forced("triton"):
        y, _ = layer_norm(torch.randn(3, 1, device=device), torch.ones(1, device=device), torch.full((1,), 3.0, device=device), 1e-6)
    assert torch.equal(y, torch.full_like(y, 3.0))


def test_without_bias_and_non_contiguous(device):
    given = arguments(bias=False, device=device)
    given["x"], given["residual"] = given["x"].transpose(0, 1), given["residual"].transpose(0, 1)
    assert not given["x"].is_contiguous()
    for version in checks.VERSIONS:
        checks.check_version(version, layer_norm, definition, given, ("x", "residual"), torch.float32)


def test_sum_alone_or_result_alone(device):
    """A loss of only one of the two results."""
    given = checks.cast(arguments(device=device), torch.float32)
    one = (torch.ones(3, 29, 96, device=device),)
    for picked in (0, 1):
        truth = checks.run(lambda **kw: definition(**kw)[picked], checks.cast(given, torch.float64), ("x", "residual"), one)  # noqa: B023
        for version in checks.VERSIONS:
            with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
                got = checks.run(lambda **kw: layer_norm(**kw)[picked], given, ("x", "residual"), one)  # noqa: B023
            for name in truth:
                torch.testing.assert_close(got[name], truth[name].float(), rtol=1e-5, atol=1e-5)


def test_empty_batch(device):
    x = torch.randn(0, 5, 32, device=device, requires_grad=True)
    for version in checks.VERSIONS:
        with versions.forced(version):
            y, _ = layer_norm(x, torch.ones(32, device=device), None, 1e-6)
        assert y.shape == x.shape


def test_gradcheck():
    given = arguments(rows=(2, 3), d=5)
    x, residual = given["x"].requires_grad_(), given["residual"].requires_grad_()
    for version in ("reference", "stock"):
        with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
            assert torch.autograd.gradcheck(lambda x, r: layer_norm(x, given["weight"], given["bias"], 1e-6, r), (x, residual))
    assert torch.autograd.gradcheck(lambda x, r: definition(x, given["weight"], given["bias"], 1e-6, r), (x, residual))


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual):
    given = list(checks.cast(arguments(residual=residual), torch.float32).values())
    given[0].requires_grad_()
    if residual:
        given[-1].requires_grad_()
    opcheck(torch.ops.smi.layer_norm.default, tuple(given))


def test_compiles_without_a_break():
    given = checks.cast(arguments(), torch.float32)
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    weights = (torch.randn(3, 29, 96), torch.randn(3, 29, 96))
    got, want = (checks.run(function, given, ("x", "residual"), weights) for function in (compiled, layer_norm))
    for name, value in want.items():
        assert torch.equal(got[name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5)}, "weight must be"),
        ({"bias": torch.ones(96, 1)}, "bias must be"),
        ({"residual": torch.ones(3, 29, 1)}, "residual must be"),
        ({"residual": torch.ones(3, 29, 96, dtype=torch.bfloat16)}, "residual must be"),
        ({"x": torch.ones(3, 29, 96, dtype=torch.int32)}, "floating point"),
        ({"weight": torch.ones(96, requires_grad=True)}, "no gradient for weight"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(**checks.cast(arguments(), torch.float32) | change)
