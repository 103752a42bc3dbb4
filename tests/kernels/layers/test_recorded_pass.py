"""Recorded calls: image by image they give the same bits as one call after the other, as often as they run."""

import pytest
import torch

from smi.csrc import host
from smi.kernels.layers.cpp import Attention, Linear, Norm
from smi.kernels.layers.recorded_pass import record

pytestmark = [pytest.mark.fast, pytest.mark.skipif(host.compiler() is None, reason="no C++ compiler")]
TOKENS = 13
FLOATS, PAIRS, TILES = (torch.float32, 48), (torch.bfloat16, 48), (torch.bfloat16, 64)  # dtype and width: which GEMM runs, where there is that one
needs_bfloat16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor does not multiply bfloat16")
KINDS = [FLOATS, pytest.param(PAIRS, marks=needs_bfloat16), pytest.param(TILES, marks=needs_bfloat16)]


@pytest.fixture(params=KINDS, ids=["floats", "pairs", "tiles"])
def kind(request):
    return request.param


def inputs(kind, images):
    dtype, width = kind
    return [torch.randn(images, TOKENS, width).to(dtype) for _ in range(2)]


def block(kind):
    """A function of x [B, T, d] and the gradient of the result that is made of every layer, forward and backward."""
    dtype, width = kind
    draw = torch.Generator().manual_seed(0)
    wide, narrow = ((torch.randn(*shape, generator=draw) * 0.1).to(dtype) for shape in ((3 * width, width), (width, 3 * width)))
    norm, qkv, fc2 = Norm(torch.rand(width, generator=draw), None, 1e-6), Linear(wide), Linear(narrow, torch.ones(width), torch.rand(width))

    def layers(x, grad):
        y, *statistics = norm.forward(x)
        packed = qkv.forward(y).unflatten(-1, (3, 4, -1))
        out, lse = Attention.forward(packed)
        a, kept = qkv.forward_activation(out, "gelu")
        result = fc2.forward_residual(a, x)
        grad_out = qkv.backward(fc2.backward_activation(grad, kept, "gelu"))
        grad_y = qkv.backward(Attention.backward(grad_out, packed, None, lse).flatten(2))
        return result, norm.backward(grad_y, grad, x, *statistics)

    return layers


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("images", [0, 1, 2, 3, 7, 20])
def test_image_by_image_is_one_after_the_other(images, threads, kind):
    layers, (x, grad) = block(kind), inputs(kind, images)
    want = layers(x, grad)
    for count in (1, 2, 3):
        threads(count)
        results, recorded_pass = record(lambda: layers(x, grad), images, TOKENS)
        recorded_pass.run()
        assert all(torch.equal(a, b) for a, b in zip(want, results, strict=True)), count


def test_a_recording_computes_when_it_runs_and_anew_each_time(kind):
    layers, (x, grad) = block(kind), inputs(kind, 4)
    results, recorded_pass = record(lambda: layers(x, grad), 4, TOKENS)
    for result in results:
        result.fill_(7)
    assert all((result == 7).all() for result in results)
    for _ in range(2):
        x.normal_()
        recorded_pass.run()
        assert all(torch.equal(a, b) for a, b in zip(layers(x, grad), results, strict=True))


def test_images_do_not_see_one_another(kind):
    layers, (x, grad) = block(kind), inputs(kind, 6)
    want = layers(x, grad)
    x[2] = float("nan")
    results, recorded_pass = record(lambda: layers(x, grad), 6, TOKENS)
    recorded_pass.run()
    others = [0, 1, 3, 4, 5]
    assert all(torch.equal(a[others], b[others]) and b[2].isnan().all() for a, b in zip(want, results, strict=True))


def test_what_would_have_to_be_copied_is_refused():
    norm, x = Norm(torch.ones(6), None, 1e-6), torch.randn(6, 5).T
    assert norm.forward(x)[0].isfinite().all()
    with pytest.raises(RuntimeError, match="contiguous"):
        record(lambda: norm.forward(x), 5, 1)


def test_a_recording_that_fails_leaves_nothing_behind():
    linear, x = Linear(torch.eye(5)), torch.randn(3, 5)

    def fails():
        linear.forward(x)
        raise KeyError

    with pytest.raises(KeyError):
        record(fails, 3, 1)
    assert torch.equal(linear.forward(x), x)
