"""Models that run as they are: the images are those of a plain autograd loop through the user's own module."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import smi
from smi.errors import InputError
from smi.models import levels
from smi.models.module import augmented, patch_size_for
from tests.conftest import small_vit

pytestmark = pytest.mark.fast

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TABLE = [(3, -5, True), (0, 0, False), (-2, 7, False), (1, 1, True)]
QUICK = {"num_images": 2, "iterations": 4, "labels": [1, 3], "progress": False, "mean": MEAN, "std": STD}


def resnet():
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that a run in training mode would change
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.pretrained_cfg = {"architecture": "resnet18"}
    return model


def swin():
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2), num_classes=5)


def hooked_vit():
    model = small_vit(num_classes=5, img_size=32)
    model.blocks[0].register_forward_hook(lambda module, args, out: 1.5 * out)
    return model


def plain_loop(model, images, labels, table):
    """DeepInversion without BatchNorm terms, as torch alone does it."""
    model.eval()
    x = images.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.25, betas=(0.5, 0.99), eps=1e-8)
    mean, std = (torch.tensor(values, dtype=x.dtype).view(-1, 1, 1) for values in (MEAN, STD))
    low, high = -mean / std, (1 - mean) / std
    for dy, dx, flip in table:
        seen = torch.roll(x, (dy, dx), (2, 3))
        logits = model(seen.flip(3) if flip else seen)
        pairs = (x[..., :-1], x[..., 1:]), (x[:, :, :-1], x[:, :, 1:]), (x[:, :, :-1, :-1], x[:, :, 1:, 1:]), (x[:, :, 1:, :-1], x[:, :, :-1, 1:])
        loss = F.cross_entropy(logits, labels) + 1e-4 * sum((a - b).norm() for a, b in pairs)
        (x.grad,) = torch.autograd.grad(loss, x)
        optimiser.step()
        with torch.no_grad():
            x.copy_(torch.maximum(torch.minimum(x, high), low))
    return x.detach()


@pytest.mark.parametrize("make", [resnet, swin, hooked_vit])
def test_dense_images_are_those_of_a_plain_loop(make):
    torch.manual_seed(0)
    model, init = make(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = smi.invert(model, method="dense", init=init, augmentation=TABLE, dtype="float64", image_size=(32, 32), **QUICK)
    assert model.training == (make is not hooked_vit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert made.sparsity == 0
    assert (made.provenance["engine"], made.provenance["dtype"]) == ("module", "float64")
    wanted = plain_loop(model.double(), init, torch.tensor([1, 3]), TABLE)
    torch.testing.assert_close(made.to_dense(), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("row", [(0, 0, 0), (3, -5, 1), (-9, 40, 0)])
def test_augmentation_of_whole_images(row):
    images = torch.randn(2, 3, 6, 10)
    rolled = torch.roll(images, row[:2], (2, 3))
    assert torch.equal(augmented(images, torch.tensor(row)), rolled.flip(3) if row[2] else rolled)


@pytest.mark.parametrize(("size", "patch"), [((224, 224), 16), ((32, 48), 16), ((28, 28), 14), ((299, 299), 13), ((331, 331), 331), ((4, 6), 2)])
def test_the_patches_of_the_container_divide_the_image(size, patch):
    assert patch_size_for(size) == patch
    assert math.gcd(*size) % patch == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "smi"}, "subset of the patches.*pass a timm VisionTransformer.*'dense' takes it"),
        ({"method": "pri"}, "'dense' takes it"),
        ({"schedule": smi.Schedule(4, 4, (smi.Event(2, 1, "lowest", "drop"),))}, "this schedule needs"),
        ({"method": "psaq"}, "attention outputs"),
        ({"method": "dense", "engine": "fused"}, "engine 'fused' cannot compute it"),
        ({"method": "dense", "dtype": "bfloat16"}, "float32 or float64"),
        ({"method": "dense", "recompute": True}, "recompute needs the fused engine"),
        ({"method": "dense", "max_memory": 1.0}, "max_memory needs the fused engine"),
        ({"method": "dense", "image_size": None}, "image size is not known: pass image_size="),
        ({"method": "dense", "mean": None}, "no values of mean are known"),
    ],
)
def test_what_needs_a_vit_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        smi.invert(resnet(), **{**QUICK, "image_size": (32, 32), **settings})


def test_runs_are_reproducible_and_go_on(tmp_path):
    torch.manual_seed(0)
    model = resnet()
    settings = {"method": "dense", "image_size": (32, 32), "batch_size": 1, "seed": 3, **QUICK, "labels": None}
    whole = smi.invert(model, **{**settings, "batch_size": 2})
    smi.invert(model, output=tmp_path / "run", **{**settings, "num_images": 1})
    both = smi.invert(model, output=tmp_path / "run", **settings)
    torch.testing.assert_close(both.patches, smi.invert(model, **settings).patches, atol=0, rtol=0)
    assert torch.equal(both.labels, whole.labels)
    with torch.no_grad():
        model.fc.bias.add_(1)
    with pytest.raises(InputError, match="weights"):
        smi.invert(model, output=tmp_path / "run", **settings)


def test_a_module_teaches_and_is_judged_but_not_quantised():
    torch.manual_seed(0)
    teacher = resnet()
    images = smi.invert(teacher, method="dense", image_size=(32, 32), **QUICK)
    student = small_vit(num_classes=5, img_size=32, patch_size=16, mean=MEAN, std=STD)
    result = smi.distill(teacher, student, images, steps=2, batch_size=2, progress=False)
    t = result.settings["temperature"]
    with torch.no_grad():
        wanted, got = (model.eval()(images.to_dense()) for model in (teacher, result.student))
    kl = t**2 * F.kl_div((got / t).log_softmax(1), (wanted / t).log_softmax(1), log_target=True, reduction="batchmean")
    assert result.best["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert smi.evaluate(images, teacher).teacher.agreement == (wanted.argmax(1) == images.labels).float().mean()
    with pytest.raises(InputError, match="ResNet is not supported"):
        smi.quantize(teacher, images)


class Pooled(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.conv, self.answer = nn.Conv2d(3, 4, 3), answer

    def forward(self, x):
        return self.answer(self.conv(x))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x, r"its answer must be logits \[2, classes\]"),
        (lambda x: {"logits": x.mean((2, 3))}, "got dict"),
        (lambda x: x.detach().mean((2, 3)), "no finite gradient"),
        (lambda x: x.mean((2, 3)) * float("nan"), "NaN or infinite"),
        (lambda x: x.reshape(3, 1), "cannot be asked for logits"),
    ],
)
def test_what_is_no_classifier_is_refused(answer, message):
    found = smi.describe(Pooled(answer), image_size=(8, 8))
    assert (found.level, found.methods) == ("refused", ())
    with pytest.raises(InputError, match=message):
        levels.read_model(Pooled(answer), image_size=(8, 8), mean=MEAN, std=STD)
