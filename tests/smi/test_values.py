"""Values of NumPy and torch in the place of Python's own, and what is no value: settings of every entry point, and what is written of them."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

import smi
from smi.distillation import Inversion, small_student
from smi.distillation.settings import TAKES, make_settings
from smi.errors import InputError
from smi.inversion.settings import InvertSettings
from smi.models.by_name import load_model
from smi.plain import for_json
from tests.conftest import small_vit
from tests.smi.distillation.distilling import QUICK, make_images

pytestmark = pytest.mark.fast
SHAPE = (2, 3, 16, 16)
SMALL = {"num_images": 2, "iterations": 6, "progress": False, "dtype": "float32"}

WELCOME = {
    "prune_at": (np.array([2, 4]), [2, 4]),
    "prune_at, tensor": (torch.tensor([2, 4]), [2, 4]),
    "prune_at, numbers": ([np.int64(2), torch.tensor(4)], [2, 4]),
    "prune_at, range": (range(2, 5, 2), [2, 4]),
    "prune_ratio": (np.float32(0.5), 0.5),
    "division": (np.int64(2), 2),
    "num_images": (np.int32(2), 2),
    "iterations": (torch.tensor(6), 6),
    "batch_size": (np.array(1), 1),
    "seed": (np.int64(1), 1),
    "seed, tensor": (torch.tensor(1), 1),
    "lr": (np.float32(0.25), 0.25),
    "lr, tensor": (torch.tensor(0.25, requires_grad=True), 0.25),
    "lr, fraction": (Fraction(1, 4), 0.25),
    "betas": (np.array([0.5, 0.75]), (0.5, 0.75)),
    "betas, list": ([np.float16(0.5), torch.tensor(0.75, dtype=torch.bfloat16)], (0.5, 0.75)),
    "tv_weight": (np.float64(0.5), 0.5),
    "flip": (np.bool_(False), False),
    "flip, tensor": (torch.tensor(False), False),
    "jitter": (np.uint8(1), 1),
    "recompute": (np.bool_(True), True),
    "labels": (np.array([1, 3], dtype=np.uint64), [1, 3]),
    "labels, numbers": ([np.int8(1), torch.tensor(3)], [1, 3]),
    "labels, one": (np.int64(3), [3]),
    "mean": (torch.tensor([0.5, 0.25, 0.5]), (0.5, 0.25, 0.5)),
    "std": (np.array([0.5, 0.25, 0.5], dtype=np.float32), (0.5, 0.25, 0.5)),
    "max_memory": (np.float32(64), 64.0),
    "init": (np.full((2, 3, 16, 16), 0.5), torch.full((2, 3, 16, 16), 0.5, dtype=torch.float64)),
    "augmentation": (np.array([[1, 2, 1]] * 6), [(1, 2, True)] * 6),
    "augmentation, tensors": (torch.tensor([[1, 2, 0]] * 6), [(1, 2, False)] * 6),
    "dtype": (torch.float32, "float32"),
    "snapshots": (np.int64(1), 1),
    "method": (np.str_("smi"), "smi"),
}


@pytest.mark.parametrize("case", WELCOME)
def test_an_inversion_takes_them_as_the_numbers_that_they_are(case, vit, tmp_path):
    """The same images, the same record, and a folder that can be read."""
    name, (given, plain) = case.split(",")[0], WELCOME[case]
    method = {"prune_at": "smi", "prune_ratio": "smi", "division": "pri"}.get(name, "dense")
    options = {"method": method, **SMALL}
    images = smi.invert(vit, **{**options, name: given}, output=tmp_path / "o")
    expected = smi.invert(vit, **{**options, name: plain}, output=tmp_path / "p")
    assert torch.equal(images.patches, expected.patches)
    assert torch.equal(smi.SparseImages.load(tmp_path / "o").index, expected.index)
    mine, theirs = (json.loads((tmp_path / folder / "images.json").read_text()) for folder in "op")
    volatile = {"run": None, "date": None}
    assert {**mine["provenance"], **volatile} == {**theirs["provenance"], **volatile}


COUNTS = ("num_images", "iterations", "batch_size", "seed", "jitter", "snapshots")
NOT_WELCOME = [
    *((name, value) for name in ("lr", "tv_weight", "max_memory") for value in (float("nan"), float("inf"), -1.0, True, "1", 1j, [1.0], 10**400)),
    *((name, value) for name in COUNTS for value in (-1, 1.0, np.float64(2), True, "2", [1])),
    *((name, None) for name in ("num_images", "batch_size", "seed", "snapshots")),
    *(("betas", value) for value in (0.5, (0.5,), (0.5, 1.0), (float("nan"), 0.5), "ab", {0.1, 0.2})),
    *(("std", value) for value in ((0.5, 0.5, float("nan")), (0.5, 0.5, 0.0), (float("inf"),) * 3, 0.5, (0.5,) * 2, "abc")),
    *(("mean", value) for value in ((0.5, 0.5, float("nan")), (0.5,) * 4, 0.5)),
    *(("labels", value) for value in ([-1], np.array([-1, 2]), [1.5], torch.tensor([0.0]), [True], "12", [None], [], [5], {1: 2})),
    *(("flip", value) for value in ("yes", 2, 0.5, [True])),
    *(("init", value) for value in (torch.full(SHAPE, float("nan")), torch.zeros(SHAPE, dtype=torch.complex64), "noise", np.array(["a"]))),
    *(("augmentation", value) for value in (5, [(0, 0)] * 6, [(0, 0, 2)] * 6, np.zeros((6, 3)), [(0, 0, None)] * 6)),
    *((name, ["smi"]) for name in ("method", "engine", "dtype", "update", "device", "importance")),
    ("losses", [1]),
    ("losses", 5),
    ("losses", smi.losses.cross_entropy),
    ("on_iteration", 5),
    ("on_batch", "print"),
    ("output", 5),
    ("force", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NOT_WELCOME, ids=lambda x: repr(x)[:30])
def test_an_inversion_refuses_the_others_before_it_computes(name, value, vit, tmp_path):
    with pytest.raises(InputError, match=name):
        smi.invert(vit, **{"method": "dense", **SMALL, "output": tmp_path / "o", name: value})
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("given", [np.array([2, 4]), 5, "24", [2.5], [True], None])
def test_prune_iterations(given, vit):
    if isinstance(given, np.ndarray | None.__class__):
        assert len(smi.invert(vit, method="smi", prune_at=given, **SMALL)) == 2
    else:
        with pytest.raises(InputError, match="prune_at must be"):
            smi.invert(vit, method="smi", prune_at=given, **SMALL)


def test_schedules_of_numpy_numbers(vit, tmp_path):
    event = smi.Event(np.int64(2), np.int64(4), "lowest", "drop")
    schedule = smi.Schedule(np.int64(16), torch.tensor(6), [event])
    assert schedule == smi.Schedule(16, 6, (smi.Event(2, 4, "lowest", "drop"),))
    smi.invert(vit, schedule=schedule, num_images=1, progress=False, output=tmp_path / "o")
    assert smi.SparseImages.load(tmp_path / "o").provenance["schedule"][0]["iteration"] == 2
    for wrong in ({"num_patches": 16.0}, {"iterations": "6"}, {"events": [1]}, {"events": 5}, {"num_patches": True}):
        with pytest.raises(InputError):
            smi.Schedule(**{"num_patches": 16, "iterations": 6, **wrong})
    with pytest.raises(InputError, match="an event's count must be a whole number"):
        smi.Event(2, 0.5, "lowest", "drop")


def test_settings_made_again_are_the_same():
    """`dataclasses.replace` takes what was taken."""
    from dataclasses import fields, replace

    once = InvertSettings(
        method="smi", num_images=np.int64(2), prune_at=np.array([1]), betas=[0.5, 0.9], flip=np.bool_(True), losses=[smi.losses.cross_entropy]
    )
    assert all(getattr(replace(once), each.name) == getattr(once, each.name) for each in fields(once))


class Odd:
    """A function whose description fails."""

    def __init__(self):
        self.__qualname__ = 5

    def __call__(self, images, logits, labels):
        return logits.sum()

    def __repr__(self):
        raise ValueError("no description")


def test_a_batch_is_not_lost_to_its_description(vit, tmp_path):
    """Functions without a name, a model's own odd facts, and what a callback puts into the record."""
    vit.pretrained_cfg |= {"flip": np.bool_(True), "architecture": np.str_("small")}

    def spoil(batch):
        batch.provenance.update({"tensor": torch.ones(2), "object": object(), 5: {1, 2}, "self": batch.provenance, "nan": float("nan")})

    images = smi.invert(vit, method="dense", losses=[Odd()], output=tmp_path / "o", on_batch=spoil, **{**SMALL, "num_images": 3, "batch_size": 1})
    found = smi.SparseImages.load(tmp_path / "o")
    assert torch.equal(found.patches, images.patches)
    assert found.provenance["tensor"] == [1.0, 1.0]
    assert found.provenance["flip"] is True


def test_for_json_is_json():
    values = [
        np.float32(0.5),
        np.arange(3),
        torch.eye(2),
        {1: (2, {3})},
        object(),
        Odd(),
        torch.empty(2, device="meta"),
        np.zeros(5000),
        b"x",
        1j,
        None,
        torch.float32,
    ]
    assert len(json.loads(json.dumps(for_json(values)))) == len(values)
    assert for_json({"a": [np.int64(1), (2.5, None, True)]}) == {"a": [1, [2.5, None, True]]}


def test_images_made_by_hand_are_written_whatever_their_tensors(tmp_path):
    """Tensors that share memory, need gradients or are slices; numbers of NumPy."""
    numbers = torch.arange(2)
    images = smi.SparseImages(
        torch.randn(2, 1, 3, 4, 4, requires_grad=True), torch.zeros(2, 4, dtype=torch.int32)[:, ::4], numbers, numbers, numbers,
        (np.int64(4), torch.tensor(4)), np.full(3, 0.5, dtype=np.float32), [np.float64(0.25)] * 3, {"array": np.arange(2)},
    )  # fmt: skip
    images.save(tmp_path)
    found = smi.SparseImages.load(tmp_path)
    assert torch.equal(found.patches, images.patches.detach())
    assert (found.grid, found.mean, found.std, found.provenance["array"]) == ((4, 4), (0.5,) * 3, (0.25,) * 3, [0, 1])
    fields = {name: getattr(images, name) for name in ("patches", "index", "labels", "trajectory", "stage", "grid", "mean", "std")}
    for name, wrong in (
        ("labels", numbers - 1), ("labels", numbers.float()), ("labels", numbers.bool()), ("stage", numbers - 5), ("trajectory", numbers * 0.5),
        ("std", (0.0, 1.0, 1.0)), ("std", (float("nan"),) * 3), ("mean", (float("inf"),) * 3), ("grid", (4.0, 4)), ("grid", (0, 4)), ("mean", 0.5),
    ):  # fmt: skip
        with pytest.raises(InputError, match=name):
            smi.SparseImages(**{**fields, name: wrong})


DISTILLED = {
    "lr": np.float32(0.25), "momentum": torch.tensor(0.5), "weight_decay": np.float64(0.0), "warmup": np.float32(0), "clip": np.float32(1),
    "steps": np.int64(2), "batch_size": torch.tensor(4), "eval_every": np.int16(2), "seed": np.uint8(3), "flip": np.bool_(False), "roll": np.int64(1),
    "temperature": torch.tensor(2), "holdout": np.float32(0.25), "cosine": np.bool_(True), "head_only": False, "patience": np.int64(3),
}  # fmt: skip


def test_a_distillation_takes_them_and_writes_its_record(vit, tmp_path):
    result = smi.distill(vit, small_student(vit), make_images(), output=tmp_path, progress=False, **DISTILLED)
    assert json.loads((tmp_path / "result.json").read_text())["asked"]["settings"]["lr"] == 0.25
    again = smi.distill(
        vit, small_student(vit), make_images(), output=tmp_path, progress=False, **{name: np.asarray(v).item() for name, v in DISTILLED.items()}
    )
    assert again.curve == result.curve


@pytest.mark.parametrize("name", TAKES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, "x", [1], 1j, torch.ones(2)], ids=repr)
def test_a_distillation_refuses_the_others(name, value):
    with pytest.raises(InputError, match=f"{name} must be"):
        make_settings("published", {name: value})


def test_numbers_of_the_other_entry_points(vit, tmp_path):
    images = make_images(count=6)
    torch.testing.assert_close(smi.forward_sparse(vit, images, batch_size=np.int64(2)), smi.forward_sparse(vit, images))
    assert smi.evaluate(images, vit, seed=np.int64(1)).record() == smi.evaluate(images, vit, seed=1).record()
    assert torch.equal(images.to_dense(np.float32(0.5)), images.to_dense(0.5))
    assert torch.equal(images.to_pixels(torch.tensor(0.25)), images.to_pixels(0.25))
    assert torch.equal(images.to_dense(np.array([1.0, 2.0, 3.0])), images.to_dense([1, 2, 3]))
    for wrong in (float("nan"), "grey", [1.0], True):
        with pytest.raises(InputError, match="fill"):
            images.to_dense(wrong)
    for wrong in (0, 1.5, True):
        with pytest.raises(InputError, match="batch_size"):
            smi.forward_sparse(vit, images, batch_size=wrong)
    real = torch.randn(3, 3, 16, 16)
    for labels in (torch.tensor([0, -1, 2]), torch.tensor([0.0, 1.0, 2.0])):
        with pytest.raises(InputError, match="labels must be whole numbers"):
            smi.evaluate(images, vit, real=(real, labels))
        with pytest.raises(InputError, match="labels must be whole numbers"):
            smi.quantization.accuracy(vit, real, labels)
        with pytest.raises(InputError, match="labels must be whole numbers"):
            smi.distill(vit, vit, images, evaluation=(real, labels), **QUICK)


class Hostile:
    """A value whose every method fails."""

    def __bool__(self):
        raise TypeError("no truth")

    def __eq__(self, other):
        raise TypeError("no comparison")

    def __iter__(self):
        raise TypeError("no items")

    __hash__ = None


NO_DATA, PIXELS = torch.zeros(2, device="meta"), torch.zeros(2, 3, 16, 16)
NESTED = torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vit: smi.invert(vit, **SMALL, labels=NO_DATA), "labels must be whole numbers"),
        (lambda vit: smi.invert(vit, **SMALL, labels=torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)), "labels must be whole numbers"),
        (lambda vit: smi.invert(vit, **SMALL, mean=Hostile()), "mean must be a sequence of numbers"),
        (lambda vit: smi.invert(vit, **SMALL, losses=np.array(2)), "losses must be a name or a sequence of functions"),
        (lambda vit: smi.invert(vit, **SMALL, prune_at=NO_DATA), "prune_at must be a sequence of numbers"),
        (lambda vit: smi.invert(vit, **SMALL, init=NO_DATA), "init must be a dense tensor"),
        (lambda vit: smi.invert(vit, **SMALL, init=PIXELS.to_sparse()), "init must be a dense tensor"),
        (lambda vit: smi.invert(vit, **SMALL, labels=NESTED), "labels must be whole numbers"),
        (lambda vit: smi.accelerate(vit)(PIXELS.to_sparse()), "images must be a dense tensor"),
        (lambda vit: smi.accelerate(vit)(NO_DATA), "images must be a dense tensor"),
        (lambda vit: smi.forward_sparse(vit, PIXELS), "images must be SparseImages"),
        (lambda vit: smi.forward_sparse(vit, (make_images().patches.to_sparse(), make_images().index)), "patches must be a dense tensor"),
        (lambda vit: replace(make_images(), labels=make_images().labels.to("meta")), "labels must be a dense tensor"),
        (lambda vit: smi.evaluate(make_images(), vit, real=(PIXELS, NESTED)), "the real images' labels must be a dense tensor"),
        (lambda vit: smi.evaluate(vit, make_images()), "images must be SparseImages"),
        (lambda vit: smi.distill(vit, small_student(vit), make_images(), **QUICK, evaluation=(PIXELS, NO_DATA)), "evaluation labels must be a dense"),
        (lambda vit: smi.Event(1, 1, np.zeros(3), "drop"), "'lowest' or 'highest' patches to 'drop' or 'emit'"),
        (lambda vit: smi.Event(1, 1, "lowest", Hostile()), "'lowest' or 'highest' patches to 'drop' or 'emit'"),
        (lambda vit: smi.distill(vit, small_student(vit), make_images(), **{**QUICK, "evaluation": [Hostile()]}), "evaluation must be images"),
        (lambda vit: smi.accelerate(vit, dtype=np.array([1, 2])), "float32, bfloat16 or float16"),
        (lambda vit: smi.accelerate(vit, dtype=Hostile()), "float32, bfloat16 or float16"),
        (lambda vit: load_model("test_vit", random_weights=np.zeros(3)), "random_weights must be True or False"),
        (lambda vit: load_model("x" * 10**6), "name must be a path that a file system takes"),
        (lambda vit: smi.load_quantized("x" * 10**6), "folder must be a path that a file system takes"),
        (lambda vit: smi.SparseImages.load("y/" * 10**4), "folder must be a path that a file system takes"),
    ],
)
def test_objects_whose_methods_fail_are_refused_in_a_sentence(call, message, vit):
    with pytest.raises(InputError, match=message):
        call(vit)


def test_a_recipe_takes_them():
    from smi.quantization.recipe import Recipe

    made = Recipe(np.int64(4), torch.tensor(6), percentile=np.float32(99.5), attention=np.bool_(True))
    assert made == Recipe(4, 6, percentile=99.5, attention=True)
    assert json.dumps(made.__dict__)
    for wrong in ({"percentile": float("nan")}, {"attention": "yes"}, {"ranges": 5}, {"weight_bits": True}, {"activation_bits": 8.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Recipe(**wrong)


def test_small_vits_differ():
    """The fixture of these tests is no constant model."""
    x = torch.randn(2, 3, 16, 16)
    assert not torch.equal(small_vit()(x)[0], small_vit()(x)[1])


def test_a_source_of_images_tells_plain_settings(vit):
    """What identifies a run in its folder; tuples were never told, so that earlier runs go on."""
    made = Inversion(vit, seed=np.int64(3), num_images=np.int64(2), prune_at=np.array([1, 2]), mean=(0.5, 0.5, 0.5), progress=False)
    assert made.about == {"seed": 3, "num_images": 2, "prune_at": [1, 2], "progress": False}
    assert json.dumps(made.about)
