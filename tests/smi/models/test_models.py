"""The description computes what the timm model computes, and what it cannot describe is refused with the reason."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import smi
from smi.engine import forward
from smi.errors import InputError
from smi.models.vit import describe
from tests.conftest import small_vit

pytestmark = pytest.mark.fast


def all_patches(vit, batch):
    return torch.arange(vit.num_patches).expand(batch, -1)


def test_logits_and_pixel_gradient_are_the_models_own(variant):
    variant = variant.double()
    vit = describe(variant)
    images = torch.randn(2, vit.channels, *vit.image_size, dtype=torch.float64, requires_grad=True)
    expected = variant(images)
    logits = forward(vit, images, all_patches(vit, 2)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(out.square().sum(), images)[0] for out in (logits, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


def test_importance_is_the_cls_row_of_the_last_block():
    model = small_vit(reg_tokens=2).double()
    vit = describe(model)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    seen = {}
    model.blocks[-1].attn.qkv.register_forward_hook(lambda module, args, out: seen.update(qkv=out))
    model(images)
    q, k, _ = seen["qkv"].reshape(2, -1, 3, 3, 8).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1).mean(1)[:, 0, 3:]
    torch.testing.assert_close(forward(vit, images, all_patches(vit, 2)).attention, expected)


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_tiny_patch16_384",
        pytest.param("vit_small_patch14_reg4_dinov2", marks=pytest.mark.slow),
    ],
)
def test_timm_architectures(name):
    model = timm.create_model(name, num_classes=7).eval()
    vit = describe(model)
    images = torch.randn(1, 3, *vit.image_size)
    with torch.no_grad():
        torch.testing.assert_close(forward(vit, images, all_patches(vit, 1)).logits, model(images), rtol=1e-3, atol=1e-4)


def test_the_model_is_left_as_it_was(vit):
    before = {name: (parameter.data_ptr(), parameter.requires_grad) for name, parameter in vit.named_parameters()}
    described = describe(vit)
    forward(described, torch.randn(1, 3, 16, 16), all_patches(described, 1))
    assert {name: (parameter.data_ptr(), parameter.requires_grad) for name, parameter in vit.named_parameters()} == before
    assert not any(tensor.requires_grad for tensor in described.tensors())


def test_hash_follows_the_weights(vit):
    first = describe(vit).weight_hash()
    assert describe(vit).weight_hash() == first
    with torch.no_grad():
        vit.head.bias[0] += 1
    assert describe(vit).weight_hash() != first


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformer is not supported"),
        (lambda: timm.create_model("eva02_tiny_patch14_224", num_classes=3), "eva02_tiny_patch14_224 is not supported"),
        (lambda: small_vit(class_token=False, global_pool="avg"), "no CLS token"),
        (lambda: small_vit(num_classes=0), "no classifier head"),
        (lambda: small_vit(global_pool="max"), "pooling 'max'"),
        (lambda: small_vit(act_layer="relu"), "activation ReLU"),
        (lambda: small_vit(norm_layer="rmsnorm"), "RmsNorm is not LayerNorm"),
        (lambda: small_vit(scale_attn_norm=True), "gated or normalised"),
        (lambda: small_vit(img_size=18, dynamic_img_size=True), "not a multiple of its patch size"),
        (lambda: timm.create_model("vit_small_r26_s32_224"), "not a single convolution"),
        (lambda: timm.create_model("vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ResPostBlock), "not the standard pre-norm block"),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(make, reason):
    with torch.device("meta"):
        model = make()
    with pytest.raises(InputError, match=reason):
        describe(model)


def test_torchvisions_vit_is_called_so():
    from torchvision.models import VisionTransformer as Torchvisions

    model = Torchvisions(image_size=8, patch_size=4, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8, num_classes=2)
    for call in (
        describe,
        smi.accelerate,
        lambda model: smi.invert(model, method="dense", num_images=1),
        lambda model: smi.datasets.load("digits", model),
    ):
        with pytest.raises(InputError, match="VisionTransformer of torchvision is not supported: pass timm's"):
            call(model)


@pytest.mark.parametrize("std", [float("nan"), float("inf"), -1.0, "1", None])
def test_statistics_are_finite(std):
    """From the model's own facts, and given."""
    model = small_vit()
    given = (0.5, 0.5, std)
    with pytest.raises(InputError, match="std must be a positive number"):
        describe(model, std=given)
    model.pretrained_cfg["std"] = given
    with pytest.raises(InputError, match="std must be a positive number"):
        smi.invert(model, method="dense", num_images=1, progress=False)
    with pytest.raises(InputError, match="mean must be a number from"):
        describe(small_vit(), mean=(0.5, 0.5, float("nan")))


def test_statistics_must_fit_the_channels():
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, in_chans=2, num_classes=2)
    with pytest.raises(InputError, match="2 channels, but no values of mean"):
        describe(model)
    assert describe(model, mean=(0.1, 0.2), std=(1.0, 2.0)).std == (1.0, 2.0)
    with pytest.raises(InputError, match="std must be a positive number"):
        describe(model, mean=(0.1, 0.2), std=(1.0, 0.0))
