"""Wrapped models: what is transparent is looked through, a normalisation in front becomes mean and std, the rest is refused with what to pass."""

import sys

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import Normalize

import smi
from smi.errors import InputError
from smi.models.vit import describe
from tests.conftest import small_vit

pytestmark = pytest.mark.fast
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
OTHER = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
QUICK = {"method": "smi", "num_images": 3, "iterations": 6, "progress": False, "seed": 4, "dtype": "float32"}


class Net(nn.Module):
    """A module around one ViT, with what happens before and after it."""

    def __init__(self, vit, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.backbone, self.before, self.after = vit, before, after

    def forward(self, x):
        return self.after(self.backbone(self.before(x)))


class Scaled(nn.Module):
    """A normalisation under another name: of pixels from 0 to 1 to the range from -1 to 1."""

    def forward(self, x):
        return x * 2 - 1


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = small_vit(), small_vit(seed=1)

    def forward(self, x):
        return self.one(x) + self.two(x)


TRANSPARENT = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda vit: torch.compile(vit, backend="eager"),
    "DataParallel of torch.compile": lambda vit: nn.DataParallel(torch.compile(vit, backend="eager")),
    "averaged weights": AveragedModel,
    "a sequence of one": nn.Sequential,
    "a module around it": Net,
    "modules around it": lambda vit: Net(nn.Sequential(nn.DataParallel(vit))),
}
NORMALISED = {
    "torchvision": lambda vit: nn.Sequential(Normalize(*OTHER), vit),
    "in DataParallel": lambda vit: nn.DataParallel(nn.Sequential(Normalize(*OTHER), vit)),
    "before DataParallel": lambda vit: nn.Sequential(Normalize(*OTHER), nn.DataParallel(vit)),
    "in a forward": lambda vit: Net(vit, Normalize(*OTHER)),
}


def made(model, **options):
    return smi.invert(model, **QUICK, **options)


def same(one, two):
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("patches", "index", "labels")) and one.mean == two.mean


@pytest.mark.parametrize("name", TRANSPARENT)
def test_a_transparent_wrapper_changes_nothing(name):
    plain, x = small_vit(), torch.randn(2, 3, 16, 16)
    wrapped = TRANSPARENT[name](plain)
    images = made(plain)
    assert same(made(wrapped), images)
    assert torch.equal(smi.accelerate(wrapped)(x), smi.accelerate(plain)(x))
    assert torch.equal(smi.drop_in(wrapped)(x)[0], smi.drop_in(plain)(x)[0])
    assert torch.equal(smi.forward_sparse(wrapped, images), smi.forward_sparse(plain, images))
    verdicts = [smi.evaluate(images, model, verifier=model) for model in (wrapped, plain)]  # a warning would be an error
    assert verdicts[0] == verdicts[1]
    assert describe(wrapped).weight_hash() == describe(plain).weight_hash()


@pytest.mark.parametrize("name", NORMALISED)
def test_a_normalisation_in_front_becomes_mean_and_std(name):
    plain = small_vit()
    wrapped, x = NORMALISED[name](plain), torch.rand(2, 3, 16, 16)
    vit = describe(wrapped)
    assert (vit.mean, vit.std) == OTHER
    images = made(plain, mean=OTHER[0], std=OTHER[1])
    assert same(made(wrapped), images)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast, own = smi.accelerate(wrapped, dtype="float32")(one), wrapped(two)  # both take fractions of white
    torch.testing.assert_close(fast, own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(fast.sum(), one)[0], torch.autograd.grad(own.sum(), two)[0], rtol=1e-3, atol=1e-4)
    assert smi.evaluate(images, wrapped).teacher == smi.evaluate(images, plain_with(plain, OTHER)).teacher
    other = made(plain)  # images on other statistics are normalised anew
    torch.testing.assert_close(
        torch.tensor(smi.evaluate(other, wrapped).teacher.confidence), torch.tensor(smi.evaluate(other, plain_with(plain, OTHER)).teacher.confidence)
    )


def plain_with(model, statistics):
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": statistics[0], "std": statistics[1]}
    return model


@pytest.mark.parametrize(
    ("front", "mean", "std"),
    [(Scaled(), (0.5,) * 3, (0.5,) * 3), (Normalize((0.0,) * 3, (1 / 255,) * 3), (0.0,) * 3, (0.00392157,) * 3), (Normalize(*OTHER), *OTHER)],
)
def test_any_affine_front_is_a_normalisation(front, mean, std):
    vit = describe(nn.Sequential(front, small_vit()))
    assert (vit.mean, vit.std) == (mean, std)


def test_statistics_that_contradict_the_models_own_are_refused():
    model = nn.Sequential(Normalize(*OTHER), small_vit())
    assert describe(model, mean=OTHER[0], std=OTHER[1]).mean == OTHER[0]
    with pytest.raises(InputError, match="normalises its pixels itself"):
        describe(model, mean=MEAN)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Net(small_vit(), after=lambda x: x.softmax(1)), "pass its ViT, model.backbone"),
        (lambda: Net(small_vit(), after=lambda x: x[:, :2]), r"must be logits \[2, 5\].*model.backbone"),
        (lambda: Net(small_vit(), before=lambda x: x.flip(3)), "more to its images than to normalise.*model.backbone"),
        (lambda: Net(small_vit(), before=lambda x: nn.functional.interpolate(x[..., :8, :8], size=16)), "more to its images.*model.backbone"),
        (lambda: Net(small_vit(), before=torch.tanh), "more to its images.*model.backbone"),
        (lambda: nn.Sequential(small_vit(), nn.Linear(5, 5)), r"pass its ViT, model\[0\]"),
        (Two, "holds 2 Vision Transformers: pass one of them, model.one or model.two"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), "Sequential is not supported"),
        (lambda: "vit", "must be a torch.nn.Module"),
    ],
)
def test_what_is_not_transparent_is_refused_with_what_to_pass(make, reason):
    for call in (describe, smi.accelerate, smi.drop_in, made):
        with pytest.raises(InputError, match=reason):
            call(make())


def test_a_quantised_model_takes_normalised_images():
    model = nn.Sequential(Normalize(*OTHER), small_vit())
    images = made(model)
    assert torch.equal(smi.quantize(model, images)(images), smi.quantize(model[1], images)(images))
    with pytest.raises(InputError, match=r"pass model\[1\] and images normalised for it"):
        smi.quantize(model, torch.rand(2, 3, 16, 16))


def test_a_student_is_trained_in_its_wrapper():
    images = made(small_vit())
    train = {"steps": 2, "batch_size": 3, "progress": False, "seed": 1}
    plain = smi.distill(small_vit(), small_vit(seed=1), images, **train)
    wrapped = smi.distill(nn.DataParallel(small_vit()), nn.DataParallel(small_vit(seed=1)), images, **train)
    assert [row["kl"] for row in wrapped.curve] == [row["kl"] for row in plain.curve]
    around = smi.distill(small_vit(), Net(small_vit(seed=1)), images, **train)
    assert isinstance(around.student, Net)
    assert [row["kl"] for row in around.curve] == [row["kl"] for row in plain.curve]


def test_a_verifier_of_another_kind_that_normalises_its_pixels_itself():
    images = made(small_vit())
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    judged = []
    for verifier in (cnn, nn.Sequential(Normalize(MEAN, STD), cnn)):
        with pytest.warns(smi.images.readers.DenseFillWarning):
            judged.append(smi.evaluate(images, small_vit(), verifier=verifier).verifier.recognition.confidence)
    assert judged[0] == pytest.approx(judged[1], rel=1e-5)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        plain = small_vit()
        wrapped = nn.parallel.DistributedDataParallel(plain)
        assert same(made(wrapped), made(plain))
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_is_compiled_for_a_model_that_compiles_itself():
    model = small_vit()
    model.compile(backend=refuse)
    describe(model)
    model.blocks[0] = torch.compile(model.blocks[0], backend=refuse)
    describe(model)
    assert "torch._dynamo" in sys.modules


def refuse(graph, inputs):
    raise AssertionError("compiled")
