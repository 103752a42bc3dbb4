"""linear_gelu and linear_residual: they share their products, and the backward of one can take in the activation of the other."""

import pytest
import torch
from torch.library import opcheck

from smi.kernels import matmul, versions
from smi.kernels.comparison import cast, error_of
from smi.kernels.linear_gelu import linear_gelu
from smi.kernels.linear_gelu.reference import ACTIVATIONS
from smi.kernels.linear_gelu.reference import linear_gelu as gelu_definition
from smi.kernels.linear_residual import linear_residual
from smi.kernels.linear_residual.reference import linear_residual as residual_definition
from smi.kernels.precision import same_precision
from tests.kernels import checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VERSIONS = ("reference", "stock", "triton")


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")


def gelu_arguments(rows=(2, 29), k=48, m=80, bias=True, activation="gelu"):
    return {"x": random(*rows, k) * 2, "weight": random(m, k) * k**-0.5, "bias": random(m) if bias else None, "activation": activation}


def residual_arguments(rows=(2, 29), k=80, m=48, bias=True, gamma=True):
    weights = {"weight": random(m, k) * k**-0.5, "bias": random(m) if bias else None}
    return {"x": random(*rows, k), **weights, "residual": random(*rows, m), "gamma": random(m) if gamma else None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_gelu_meets_the_error_rule(version, activation, dtype):
    checks.check_version(version, linear_gelu, gelu_definition, gelu_arguments(activation=activation), ("x",), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("gamma", [False, True])
def test_linear_residual_meets_the_error_rule(version, gamma, dtype):
    checks.check_version(version, linear_residual, residual_definition, residual_arguments(gamma=gamma), ("x", "residual"), dtype)


SIZES = [((1,), 64, 64), ((47,), 33, 130), ((48,), 100, 7), ((2, 25), 65, 129), ((99,), 128, 97)]  # rows, k, m


@pytest.mark.parametrize(("rows", "k", "m"), SIZES)
def test_odd_sizes(rows, k, m):
    checks.check_version("triton", linear_gelu, gelu_definition, gelu_arguments(rows, k, m), ("x",), torch.float32)
    checks.check_version("triton", linear_residual, residual_definition, residual_arguments(rows, k, m), ("x", "residual"), torch.float32)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_tile_that_ships(architecture, place, monkeypatch):
    """Two rows and two columns of tiles or more, with rests."""
    if torch.cuda.is_available():
        pytest.skip("tiles of other architectures may not fit this GPU")

    def take(table, M, N, K, device, dtype, left=1):
        tiles = table[architecture, dtype.itemsize]
        return tiles[min(place, len(tiles) - 1)]

    for operation in ("linear_gelu", "linear_residual"):
        monkeypatch.setattr(versions.load(operation, "triton"), "choose", take)
    given, other = gelu_arguments((1, 131), 72, 259), residual_arguments((131,), 72, 259)
    checks.check_version("triton", linear_gelu, gelu_definition, given, ("x",), torch.bfloat16)
    checks.check_version("triton", linear_residual, residual_definition, other, ("x", "residual"), torch.bfloat16)
    compare_backward_gelu("triton", "gelu", torch.bfloat16, residual_arguments((131,), 259, 72))


def test_the_chosen_tile_fills_the_machine():
    """DeiT-Base's MLP at 128 images takes the largest tile. The smallest is taken for a handful of rows, and in DeiT-Tiny, whose 192 steps do not pay
    for a large epilogue."""
    table = matmul.TILES

    def chosen(M, N, K):
        return matmul.choose(table, M, N, K, torch.device("cpu"), torch.bfloat16)

    assert chosen(25216, 3072, 768) == chosen(6016, 3072, 768) == table[90, 2][0]
    assert chosen(6016, 768, 192) == chosen(64, 768, 768) == table[90, 2][-1]


def test_two_programs_that_overlap_are_chosen_over_one():
    """Of two tiles that differ only by how many programs a multiprocessor holds, the one of which it holds two, where there are as many."""
    one = matmul.Tile(128, 128, 64, 8, 4)
    two = one._replace(stages=3, resident=2)
    table = {(90, 2): (one, two)}
    assert matmul.choose(table, 25216, 3072, 768, torch.device("cpu"), torch.bfloat16) == two
    assert matmul.launch_options(two._replace(maxnreg=128), 768, torch.bfloat16)["maxnreg"] == 128
    assert "maxnreg" not in matmul.launch_options(two, 768, torch.bfloat16)


def test_tiles_are_finished_in_groups_and_none_is_missed():
    """tile_position, called as the kernels call it: every tile once."""
    import triton
    import triton.language as tl

    @triton.jit
    def positions(p_out, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
        i_m, i_n = matmul.tile_position(tl.program_id(0), M, N, BM, BN, GROUP)
        tl.store(p_out + 2 * tl.program_id(0), i_m)
        tl.store(p_out + 2 * tl.program_id(0) + 1, i_n)

    out = torch.full((11 * 3, 2), -1, dtype=torch.int32, device=random(1).device)
    positions[(33,)](out, 11 * 16 - 3, 3 * 32 - 5, BM=16, BN=32, GROUP=8)
    assert sorted(map(tuple, out.tolist())) == [(i, j) for i in range(11) for j in range(3)]
    assert {i for i, _ in out[:24].tolist()} == set(range(8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gamma", [False, True])
def test_backward_through_the_activation(version, activation, dtype, gamma):
    compare_backward_gelu(version, activation, dtype, residual_arguments(gamma=gamma))


def compare_backward_gelu(version, activation, dtype, given):
    """backward_gelu with what linear_gelu saves, f'(h), is linear_residual's backward, then the activation's."""
    grad, h = random(*given["residual"].shape), 2 * random(*given["x"].shape)
    rounded = cast({"weight": given["weight"], "gamma": given["gamma"], "h": h, "grad": grad}, dtype)
    one = torch.ones(1, 1, dtype=dtype, device=h.device)

    def chain(values):
        h = values["h"].clone().requires_grad_()
        y = residual_definition(ACTIVATIONS[activation](h), values["weight"], None, torch.zeros_like(values["grad"]), values["gamma"])
        return torch.autograd.grad(y, h, values["grad"])[0]

    truth = chain(cast(rounded, torch.float64))
    with same_precision():
        plain = chain(rounded)
    function = versions.load("linear_residual", version).backward_gelu
    _, slope = versions.load("linear_gelu", version).forward(rounded["h"].reshape(-1, 1), one, None, activation, True)
    out = function(rounded["grad"], rounded["weight"], rounded["gamma"], slope.view_as(h))
    checks.assert_passes(error_of("d_h", out, plain, truth))


def test_non_contiguous_without_bias_and_empty():
    given = gelu_arguments(bias=False)
    given["x"] = given["x"].transpose(0, 1)
    given["weight"] = given["weight"].T.contiguous().T
    other = residual_arguments(bias=False)
    other["x"], other["residual"] = other["x"].transpose(0, 1), other["residual"].transpose(0, 1)
    for version in VERSIONS:
        checks.check_version(version, linear_gelu, gelu_definition, given, ("x",), torch.float32)
        checks.check_version(version, linear_residual, residual_definition, other, ("x", "residual"), torch.float32)
        with versions.forced(version):
            empty = cast(gelu_arguments(rows=(0, 3)), torch.float32)
            assert linear_gelu(**empty).shape == (0, 3, 80)
            assert linear_residual(**cast(residual_arguments(rows=(0,)), torch.float32)).shape == (0, 48)


def test_extreme_inputs_of_the_activation():
    """Large and non-finite pre-activations: no NaN where the definition has none, and the tails do not cancel."""
    h = torch.tensor([-1e4, -40.0, -9.0, -5.0, -1e-8, 0.0, 1e-8, 5.0, 40.0, 1e4, float("inf"), float("nan")], dtype=torch.float64)[:, None]
    one, device = torch.ones(1, 1), random(1).device
    for activation in ACTIVATIONS:
        truth = gelu_definition(h, one.double(), None, activation)
        with versions.forced("triton"):
            out = linear_gelu(h.float().to(device), one.to(device), None, activation).cpu()
        torch.testing.assert_close(out.double(), truth, rtol=2e-5, atol=1e-6, equal_nan=True)


def test_gradcheck():
    x, residual = gelu_arguments((5,), 6, 7), residual_arguments((5,), 6, 7)
    leaves = [x["x"].requires_grad_(), residual["x"].requires_grad_(), residual["residual"].requires_grad_()]
    for version in ("reference", "stock"):
        with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
            for activation in ACTIVATIONS:
                assert torch.autograd.gradcheck(lambda v: linear_gelu(**x | {"x": v, "activation": activation}), leaves[:1])  # noqa: B023
            assert torch.autograd.gradcheck(lambda v, r: linear_residual(**residual | {"x": v, "residual": r}), leaves[1:])


def test_nothing_is_kept_without_gradient():
    given = tuple(cast(gelu_arguments(), torch.float32).values())
    for version in VERSIONS:
        y, slope = versions.load("linear_gelu", version).forward(*given, False)
        assert slope.numel() == 0
        assert torch.equal(y, versions.load("linear_gelu", version).forward(*given, True)[0])


def test_opcheck():
    given = list(cast(gelu_arguments(), torch.float32).values())
    opcheck(torch.ops.smi.linear_gelu.default, (*given, False))
    given[0].requires_grad_()
    opcheck(torch.ops.smi.linear_gelu.default, (*given, True))
    for gamma in (False, True):
        values = cast(residual_arguments(gamma=gamma), torch.float32)
        opcheck(torch.ops.smi.linear_residual.default, tuple(v.requires_grad_() if n in ("x", "residual") else v for n, v in values.items()))
        slope, grad = torch.randn(2, 29, 80), torch.randn(2, 29, 48)
        opcheck(torch.ops.smi.linear_residual_backward_gelu.default, (grad, values["weight"], values["gamma"], slope))


def test_compiles_without_a_break():
    given, other = cast(gelu_arguments(), torch.float32), cast(residual_arguments(), torch.float32)

    def mlp(x):
        return linear_residual(linear_gelu(x, given["weight"], given["bias"]), **{n: v for n, v in other.items() if n != "x"})

    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    weights = (torch.randn_like(other["residual"]),)
    got, want = (checks.run(function, {"x": given["x"]}, ("x",), weights) for function in (compiled, mlp))
    for name, value in want.items():
        assert torch.equal(got[name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation must be one of gelu, gelu_tanh, quick_gelu, got 'relu'"),
        ({"weight": torch.ones(80, 47)}, r"weight must be \[m, 48\]"),
        ({"bias": torch.ones(81)}, r"bias must be \[80\]"),
        ({"weight": torch.ones(80, 48).bfloat16()}, "weight must have x's dtype"),
        ({"bias": torch.ones(80, requires_grad=True)}, "no gradient for bias"),
    ],
)
def test_linear_gelu_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        linear_gelu(**cast(gelu_arguments(), torch.float32) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.ones(2, 29, 80)}, "residual must be"),
        ({"gamma": torch.ones(48).half()}, "gamma must be"),
        ({"gamma": torch.ones(48, requires_grad=True)}, "no gradient for gamma"),
    ],
)
def test_linear_residual_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        linear_residual(**cast(residual_arguments(), torch.float32) | change)
