"""The fused engine against the reference: logits, CLS row and pixel gradients, on every kind of model, by both families of layers."""

import pytest
import torch
from smi import engine
from smi.engine.fused import Buffers, Fused
from smi.errors import InputError
from smi.kernels import frozen, packed
from smi.models import describe

from tests.conftest import small_vit

AUGMENTATION = torch.tensor([-3, 2, 1], dtype=torch.int32)


@pytest.fixture(params=["packed", "frozen"])
def family(request, monkeypatch):
    """The layers in use: C++, or the dispatcher's with PyTorch's own operations."""
    if request.param == "frozen":
        monkeypatch.setenv("SMI_BACKEND", "stock")
    elif packed.unsupported(torch.ones(1)):
        pytest.skip("no C++ compiler")
    return {"packed": packed, "frozen": frozen}[request.param]


def problem(model, batch=3, active=None, seed=1):
    vit = describe(model)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, vit.channels, *vit.image_size, generator=generator)
    order = torch.rand(batch, vit.num_patches, generator=generator).argsort(1)
    index = order[:, : vit.num_patches if active is None else active].sort(1).values
    pull = torch.randn(batch, vit.num_classes, generator=generator)
    return vit, images, index, pull


def by_reference(vit, images, index, augmentation, pull, dtype=torch.float64):
    pixels = images.to(dtype).requires_grad_()
    output = engine.forward(vit.to("cpu", dtype), pixels, index, augmentation)
    (grad,) = torch.autograd.grad(output.logits, pixels, pull.to(dtype))
    return output, grad


def relative(out, truth):
    return ((out.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("active", [None, 5, 1])
def test_agrees_with_the_reference_on_every_model(variant, active, family):
    vit, images, index, pull = problem(variant, active=None if active is None else min(active, describe(variant).num_patches))
    truth, grad = by_reference(vit, images, index, AUGMENTATION, pull)
    fused = Fused(vit, "float32")
    assert fused.family is family
    output, _, saved = fused.forward(images, index, AUGMENTATION)
    found = fused.backward(saved, pull)
    assert relative(output.logits, truth.logits) < 1e-5
    assert relative(output.attention, truth.attention) < 1e-5
    assert relative(found, grad) < 1e-5
    assert torch.equal(found == 0, grad == 0)


def test_static_memory_gives_the_same_every_time(variant, family):
    """Twice into the same memory, with another pass without backward between the two."""
    vit, images, index, pull = problem(variant)
    fused, memory = Fused(vit, "float32"), Buffers()
    want, _, saved = fused.forward(images, index, AUGMENTATION)
    grad = fused.backward(saved, pull)
    for _ in range(2):
        got, _, saved = fused.forward(images, index, AUGMENTATION, memory)
        assert torch.equal(fused.backward(saved, pull), grad)
        assert torch.equal(got.logits, want.logits)
        look, _, _ = fused.forward(images, index, AUGMENTATION, memory, keep=False)
        torch.testing.assert_close(look.logits, want.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(look.attention, want.attention, rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_what_is_promised():
    """3d + 4d + 2d elements per token and block, and a few numbers per row."""
    vit, images, index, _ = problem(small_vit(depth=4, embed_dim=48))
    fused = Fused(vit, "float32")
    if fused.family is frozen:
        pytest.skip("no C++ compiler")
    _, _, saved = fused.forward(images, index)
    tokens, d, blocks = 3 * 17, 48, 3
    per_row = 4 + 3  # mean and 1 / deviation of two norms, one number per head
    last = tokens * (d + 2)
    assert saved.bytes() == 4 * (tokens * blocks * (9 * d + per_row) + last)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype):
    vit, images, index, pull = problem(small_vit(embed_dim=48, depth=3))
    truth, grad = by_reference(vit, images, index, AUGMENTATION, pull)
    fused = Fused(vit, dtype)
    output, _, saved = fused.forward(images, index, AUGMENTATION)
    found = fused.backward(saved, pull)
    assert found.dtype == torch.float32
    assert (torch.nn.functional.cosine_similarity(found.flatten(1).double(), grad.flatten(1)) > 0.99).all()
    assert relative(output.logits, truth.logits) < 0.05


def test_float64_is_refused():
    with pytest.raises(InputError, match="engine='reference'"):
        Fused(describe(small_vit()), "float64")
