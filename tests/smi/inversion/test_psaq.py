"""PSAQ-ViT's loss against a naive one, and the methods psaq and gaussian."""

import math

import pytest
import torch

import smi
from smi import engine
from smi.cli.main import run
from smi.errors import InputError
from smi.inversion import psaq
from smi.inversion.prepare import prepare
from smi.inversion.settings import Settings
from smi.models.vit import describe
from tests.conftest import small_vit

pytestmark = pytest.mark.fast

QUICK = {"iterations": 8, "progress": False}


def naive_attention(model, images):
    """Every block's softmax(q k) v of a timm ViT, [B, heads, tokens, width], from its modules alone."""
    outputs, x = [], model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for block in model.blocks:
        tokens, attn = block.norm1(x), block.attn
        q, k, v = attn.qkv(tokens).reshape(*tokens.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        outputs.append(((q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])).softmax(-1) @ v)
        x = block(x)
    return outputs


def naive_loss(outputs, prefix):
    """Minus the entropies, one image, one pair and one point after the other."""
    total = 0.0
    for output in outputs:
        patches = output[:, :, prefix:].mean(1)
        batch, n = patches.shape[:2]
        s = [[[torch.cosine_similarity(patches[b, i], patches[b, j], dim=0).item() for j in range(n)] for i in range(n)] for b in range(batch)]
        low, high = min(min(map(min, image)) for image in s), max(max(map(max, image)) for image in s)
        points = [low + (high - low) * k / 9 for k in range(10)]
        for image in s:
            p = []
            for x in points:
                kernels = [math.exp(-((value - x) ** 2) / (2 * 0.01**2)) / math.sqrt(2 * math.pi * 0.01**2) for row in image for value in row]
                p.append(sum(kernels) / len(kernels) + 1e-4)
            heights = [-value * math.log(value) for value in p]
            total -= sum((a + b) / 2 * (high - low) / 9 for a, b in zip(heights, heights[1:], strict=False)) / batch
    return total


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}], ids=["plain", "registers"])
def test_the_loss_is_that_of_a_naive_implementation_in_float64(options):
    model = small_vit(**options).double()
    vit = describe(model)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    outputs = []
    logits = engine.forward(vit, images, torch.arange(16).expand(3, -1), attention_outputs=outputs).logits
    with torch.no_grad():
        expected = naive_loss(naive_attention(model, images), vit.num_prefix)
        torch.testing.assert_close(logits, model(images))
    assert [tuple(output.shape) for output in outputs] == [(3, 16, 3, 8)] * 2
    assert psaq.patch_similarity(images, logits, None, outputs).item() == pytest.approx(expected, rel=1e-9)


def test_its_gradient_is_right():
    torch.manual_seed(0)
    output = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    output = (output.mean(0, keepdim=True) + 0.01 * output).requires_grad_()  # similar patches, where the density is smooth
    samples = torch.rand(2, 9, dtype=torch.float64).mul(0.05).requires_grad_()
    points = torch.linspace(0, 0.05, 10, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: psaq._Density.apply(s, points), samples)
    (grad,) = torch.autograd.grad(psaq.block_entropy(output).sum(), output)
    assert torch.isfinite(grad).all()
    assert grad.norm() > 0


def test_total_variation_is_pulled_to_a_target_that_grows_with_the_norms():
    (*_, pull) = psaq.losses(torch.Generator().manual_seed(1))
    small, large = torch.randn(4, 3, 32, 32), torch.randn(16, 3, 64, 64)
    distances = [psaq.TV_WEIGHT * psaq.tv_norms(images).sum() - pull(images, None, None) for images in (small, large)]
    assert distances[1] / distances[0] == pytest.approx(4, rel=1e-4)
    full = math.sqrt(32 * 3 * 224 * 224 / small.numel()) * distances[0] / psaq.TV_WEIGHT
    assert 2500 <= full <= 3000


def test_the_published_settings(vit):
    run_ = prepare(vit, Settings(method="psaq", num_images=2))
    assert (run_.schedule.iterations, run_.schedule.events, run_.settings.lr, run_.settings.betas) == (1000, (), 0.20, (0.5, 0.9))
    wide = prepare(small_vit(img_size=224, patch_size=32), Settings(method="psaq", num_images=1))
    assert (wide.table[:, 0] == wide.table[:, 1]).all()
    assert wide.table[:500, 0].abs().max() == 15
    assert wide.table[500:, 0].abs().max() == 30
    assert 0.4 < wide.table[:, 2].double().mean() < 0.6
    assert prepare(vit, Settings(method="psaq", num_images=1, flip=False)).table[:, 2].sum() == 0


def test_it_raises_the_entropy(vit):
    seen = []
    loss = lambda *given: seen.append(psaq.patch_similarity(*given)) or seen[-1]  # noqa: E731
    loss.needs = "attention_outputs"
    smi.invert(vit, method="dense", num_images=3, iterations=40, losses=[loss], lr=0.02, jitter=0, flip=False, progress=False)
    assert seen[-1] < seen[0] - 0.5


@pytest.mark.parametrize(("method", "shape"), [("psaq", (4, 16)), ("smi", (4, 2)), ("pri", (4, 2))])
def test_dense_sparse_and_rebirth(vit, method, shape):
    losses = None if method == "psaq" else "psaq"
    images = smi.invert(vit, method=method, num_images=4, losses=losses, **QUICK)
    assert tuple(images.index.shape) == shape
    assert images.provenance["method"] == method
    assert any("patch_similarity" in name for name in images.provenance["losses"])
    assert len(smi.forward_sparse(vit, images)) == 4


def test_gaussian_images_are_the_noise_that_others_start_from(vit):
    noise = smi.invert(vit, method="gaussian", num_images=40, labels=[3], progress=False)
    assert tuple(noise.patches.shape) == (40, 16, 3, 4, 4)
    assert abs(noise.patches.mean()) < 0.02
    assert noise.patches.std() == pytest.approx(1, abs=0.02)
    assert noise.labels.unique().tolist() == [3]
    assert torch.equal(noise.patches, smi.invert(vit, method="gaussian", num_images=40, labels=[3], progress=False).patches)
    assert noise.provenance["iterations"] == 0


def test_gaussian_takes_no_iterations(vit):
    with pytest.raises(InputError, match="gaussian images are noise and take no iterations, got 5"):
        smi.invert(vit, method="gaussian", num_images=1, iterations=5, progress=False)


def test_unknown_losses_are_refused(vit):
    with pytest.raises(InputError, match="unknown losses 'best'"):
        smi.invert(vit, method="dense", num_images=1, losses="best", **QUICK)


@pytest.mark.parametrize("method", ["psaq", "gaussian"])
def test_by_command(tmp_path, method):
    arguments = ["--iterations", "3"] if method == "psaq" else []
    assert run(["invert", "-o", str(tmp_path), "-n", "2", "--method", method, *arguments]) == 0
    assert len(smi.SparseImages.load(tmp_path)) == 2
