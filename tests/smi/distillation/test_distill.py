"""Knowledge transfer: the augmentation, the loss, the loop, the students, and what is refused."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import smi
from smi import engine
from smi.cli.main import run
from smi.distillation import Inversion, augment, make_student, partly_fresh, small_student
from smi.distillation.loop import divergence
from smi.distillation.settings import make_optimiser, make_settings
from smi.errors import InputError, RunError
from smi.images.patches import from_patches, to_patches
from smi.images.readers import DenseFillWarning
from smi.images.sparse_images import SparseImages
from smi.models.vit import describe
from smi.teachers import digits
from tests.conftest import small_vit
from tests.smi.distillation.distilling import QUICK, make_images


@pytest.fixture
def images():
    return make_images()


class Convolutional(nn.Module):
    """A student that is no ViT, with batch statistics."""

    def __init__(self, channels=3, classes=5):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, classes)

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.body(x))


# augmentation


def test_rolling_whole_images_is_rolling_their_pixels():
    torch.manual_seed(0)
    x = torch.randn(8, 2, 12, 20)
    offsets = torch.tensor([[0, 0], [1, -2], [5, 7], [-3, 2], [2, 2], [-6, -9], [4, -8], [100, -100]])
    flips = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0]).bool()
    patches, index = augment.roll_and_flip(to_patches(x, 4), torch.arange(15).expand(8, -1), (3, 5), offsets, flips)
    made = from_patches(patches, index, (3, 5), torch.zeros(2))
    for image, offset, flip, result in zip(x, offsets.tolist(), flips, made, strict=True):
        wanted = image.roll(offset, (1, 2))
        assert torch.equal(result, wanted.flip(-1) if flip else wanted)


def test_a_patch_moves_with_its_cell_and_repeats_its_border_where_neighbours_are_missing():
    patches = torch.arange(16.0).view(1, 1, 1, 4, 4)
    moved, index = augment.roll_and_flip(patches, torch.tensor([[5]]), (4, 4), torch.tensor([[4, -4]]), torch.tensor([False]))
    assert index.tolist() == [[8]]
    assert torch.equal(moved, patches)
    moved, index = augment.roll_and_flip(patches, torch.tensor([[5]]), (4, 4), torch.tensor([[1, 0]]), torch.tensor([True]))
    assert index.tolist() == [[6]]
    assert torch.equal(moved[0, 0, 0], patches[0, 0, 0][[0, 0, 1, 2]].flip(-1))


def test_the_index_map_follows_as_in_the_inversion(vit, images):
    """By whole cells, an augmented sparse image is read as the engine reads the image it was rolled from."""
    images = images[:4]
    for offset, flip in ((4, True), (-8, False)):
        offsets = torch.full((4, 2), offset)
        patches, index = augment.roll_and_flip(images.patches, images.index, images.grid, offsets, torch.full((4,), flip))
        got = smi.forward_sparse(vit, (patches, index))
        wanted = engine.forward(describe(vit), images.to_dense(), images.index, torch.tensor([offset, offset, int(flip)])).logits
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_patch_dropout_leaves_patches_on_their_cells():
    generator = torch.Generator().manual_seed(0)
    index = torch.rand(4, 20).argsort(1)[:, :12]
    patches = index[..., None, None, None].float().expand(-1, -1, 1, 2, 2)
    counts = set()
    for _ in range(60):
        some, cells = augment.drop_patches(patches, index, 0.75, generator)
        assert torch.equal(some[:, :, 0, 0, 0].long(), cells)
        assert all(
            len(set(row.tolist())) == cells.shape[1] and set(row.tolist()) <= set(all_.tolist()) for row, all_ in zip(cells, index, strict=True)
        )
        counts.add(cells.shape[1])
    assert counts == set(range(3, 13))
    assert augment.drop_patches(patches[:, :1], index[:, :1], 0.99, generator)[1].shape[1] == 1


def test_draws_stay_within_the_roll_and_do_not_flip_unasked():
    offsets, flips = augment.draw(500, 3, False, torch.Generator().manual_seed(0))
    assert set(offsets.flatten().tolist()) == {-3, -2, -1, 0, 1, 2, 3}
    assert not flips.any()
    assert 150 < int(augment.draw(500, 3, True, torch.Generator().manual_seed(0))[1].sum()) < 350


# the loss


def test_divergence_against_its_definition():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 5, dtype=torch.float64).unbind()
    p, q = (teacher / 20).softmax(1), (student / 20).softmax(1)
    wanted = 400 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(divergence(student, teacher, 20.0), wanted)
    assert divergence(teacher, teacher, 20.0).abs() < 1e-12


def test_the_published_preset_is_the_published_optimiser(vit):
    settings = make_settings("published", {})
    (group,) = make_optimiser(vit, settings).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], settings.temperature) == (0.1, 0.9, 1e-4, 20.0)
    assert settings.rate(0) == settings.rate(1999) == 0.1


# the loop


def test_a_student_learns_from_the_retained_patches_alone(vit, images):
    student = partly_fresh(vit, 1)
    result = smi.distill(vit, student, images, **{**QUICK, "steps": 60}, lr=3e-3, roll=0, evaluation=(torch.randn(6, 3, 16, 16), torch.arange(6) % 5))
    assert result.curve[-1]["kl"] < 0.5 * result.curve[0]["kl"]
    assert [row["step"] for row in result.curve] == list(range(4, 61, 4))
    assert result.accuracy == result.best["accuracy"]
    assert 0 <= result.accuracy <= 1
    assert not result.student.training
    assert torch.equal(student.head.weight, partly_fresh(vit, 1).head.weight)  # the student given is left as it was


def test_both_are_fed_the_same_short_sequences(vit, images, monkeypatch):
    fed = set()

    def recorded(name, forward):
        def call(model, patches, index, *rest):
            fed.add((name, patches.shape[1], index.shape[1]))
            return forward(model, patches, index, *rest)

        return call

    monkeypatch.setattr("smi.images.forward.forward_patches", recorded("student", engine.forward_patches))
    monkeypatch.setattr(engine.Fused, "forward_patches", recorded("teacher", engine.Fused.forward_patches))
    smi.distill(vit, small_student(vit), images, **QUICK, patch_dropout=0.0)
    assert fed == {("student", 6, 6), ("teacher", 6, 6)}
    fed.clear()
    smi.distill(vit, small_student(vit), images, **{**QUICK, "steps": 30}, patch_dropout=0.5)
    assert fed == {(name, n, n) for name in ("student", "teacher") for n in range(3, 7)}


def test_the_head_alone(vit, images):
    student = partly_fresh(vit, 1)
    result = smi.distill(vit, student, images, head_only=True, **QUICK)
    before, after = student.state_dict(), result.student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


def test_the_best_weights_are_kept_not_the_last(vit, images):
    """At a rate that spoils what was learned, the result is the student as it was at its best evaluation, and the run ends early."""
    options = {"batch_size": 8, "eval_every": 1, "progress": False, "optimiser": "adamw", "weight_decay": 0.0, "roll": 0, "lr": 0.01}
    student = partly_fresh(vit, 1)
    result = smi.distill(vit, student, images, steps=200, patience=5, **options)
    assert result.stopped_early
    assert result.steps == result.best["step"] + 5 < 200
    assert result.best["kl"] == min(row["kl"] for row in result.curve)
    until = smi.distill(vit, student, images, steps=result.best["step"], **options)
    for name, weight in until.student.state_dict().items():
        assert torch.equal(weight, result.student.state_dict()[name]), name


def test_images_are_refreshed_by_round(vit):
    rounds = []

    def source(number):
        rounds.append(number)
        return make_images(16, seed=number)

    smi.distill(vit, small_student(vit), source, refresh_every=4, **QUICK)
    assert rounds == [0, 1, 2]
    smi.distill(vit, small_student(vit), iter([make_images(16, seed=i) for i in range(3)]), refresh_every=4, **QUICK)
    with pytest.raises(InputError, match="ended after 2 batches"):
        smi.distill(vit, small_student(vit), iter([make_images(16, seed=i) for i in range(2)]), refresh_every=4, **QUICK)


def test_images_from_a_running_inversion(vit):
    settings = {"method": "pri", "division": 2, "iterations": 4, "num_images": 8}
    generator = smi.invert_batches(vit, **{**settings, "num_images": 24, "batch_size": 4})
    smi.distill(vit, small_student(vit), generator, refresh_every=4, **QUICK)
    source = Inversion(vit, progress=False, **settings)
    assert not torch.equal(source(0).patches, source(1).patches)
    assert torch.equal(source(1).patches, source(1).patches)


# students


def test_a_student_that_is_no_vit_sees_the_filled_image(vit, images):
    with pytest.warns(DenseFillWarning, match="62%"):
        result = smi.distill(vit, Convolutional(), images, **QUICK)
    assert result.student.body[1].num_batches_tracked == 12
    other_grid = small_vit(patch_size=8)
    with pytest.warns(DenseFillWarning, match="the student is no ViT on the images' 4x4 grid"):
        smi.distill(vit, other_grid, images, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smi.distill(vit, small_student(vit), images, **QUICK)
        smi.distill(vit, other_grid, make_images(kept=16), **QUICK)  # nothing is missing


def test_a_student_trained_on_other_statistics_sees_its_own(vit, images):
    """A copy of the teacher that wants its pixels otherwise normalised agrees with it only if they are."""
    student = copy.deepcopy(vit)
    with torch.no_grad():  # it sees half of what the teacher sees
        student.patch_embed.proj.weight.mul_(2.0)
    student.pretrained_cfg = {**vit.pretrained_cfg, "std": tuple(2 * s for s in vit.pretrained_cfg["std"])}
    result = smi.distill(vit, student, images, **QUICK, lr=1e-12)
    assert result.curve[0]["kl"] < 1e-5


def test_students_by_name(vit):
    teacher = digits()
    for name in ("small", "teacher", "vit_tiny_patch16_224"):
        student = make_student(name, teacher)
        assert student.patch_embed.img_size == (32, 32)
        assert describe(student).num_classes == 10
        assert describe(student).channels == 1
    assert torch.equal(make_student("small", teacher, seed=3).head.weight, make_student("small", teacher, seed=3).head.weight)
    assert not torch.equal(make_student("small", teacher, seed=3).head.weight, make_student("small", teacher, seed=4).head.weight)
    with pytest.raises(InputError, match="unknown model 'smal'"):
        make_student("smal", teacher)
    with pytest.raises(InputError, match="between 0 and the teacher's 4, got 5"):
        make_student("teacher", teacher, fresh_blocks=5)
    with pytest.raises(InputError, match="'teacher'"):
        make_student("small", teacher, fresh_blocks=1)


def test_fresh_blocks_are_fresh_and_the_others_the_teachers(vit):
    student = partly_fresh(vit, 1)
    mine, theirs = student.state_dict(), vit.state_dict()
    same = {name for name in mine if torch.equal(mine[name], theirs[name])}
    assert same == {name for name in mine if name.startswith(("cls_token", "pos_embed", "patch_embed", "blocks.0."))}


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (lambda: small_vit(in_chans=1), "the student takes 1 channels, but the images have 3"),
        (lambda: small_vit(num_classes=7), "the student has 7 classes, the teacher 5"),
        (lambda: small_vit(img_size=24), "the student cannot take images of 3x16x16"),
        (lambda: Convolutional(channels=4), "the student cannot take images of 3x16x16"),
    ],
)
@pytest.mark.filterwarnings("ignore::smi.images.readers.DenseFillWarning")
def test_students_that_cannot_take_the_images(vit, images, student, message):
    with pytest.raises(InputError, match=message):
        smi.distill(vit, student(), images, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"temperature": 0}, "temperature must be a positive number"),
        ({"preset": "best"}, "unknown preset 'best': it must be published or adamw"),
        ({"stepps": 3}, "distill does not take stepps"),
        ({"holdout": 1.0}, "holdout must be a number from 0 up to 1"),
        ({"lr": 1e300}, "lr must be a positive number up to 1e30, got 1e"),  # which no float32 holds
        ({"preset": 10**5000}, "unknown preset 'int'"),  # which has no text
        ({"clip": -1.0}, "clip must be a positive number up to 1e30, got -1.0"),
        ({"warmup": -0.1}, "warmup must be a number from 0 up to 1, got -0.1"),
        ({"momentum": 1.0}, "momentum must be a number from 0 up to 1"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number from 0 to 1e30, got nan"),
        ({"refresh_every": 5}, "refreshing needs a source"),
        ({"evaluation": (torch.empty(0, 3, 16, 16), torch.empty(0))}, "evaluation needs as many labels as images"),
        ({"evaluation": (torch.zeros(1, 3, 16, 16), torch.tensor([5]))}, "labels must be whole numbers of 0 to 4, got int64 from 5"),
        ({"evaluation": (torch.zeros(1, 3, 20, 20), torch.tensor([0]))}, "cannot take the evaluation images"),
    ],
)
def test_settings_that_make_no_sense(vit, images, options, message):
    with pytest.raises(InputError, match=message):
        smi.distill(vit, small_student(vit), images, **{**QUICK, **options})


@pytest.mark.filterwarnings("ignore::smi.images.readers.DenseFillWarning")
def test_images_of_another_model_or_none_at_all(vit, images):
    with pytest.raises(InputError, match="there are no images"):
        smi.distill(vit, small_student(vit), images[:0], **QUICK)
    with pytest.raises(InputError, match="images must be SparseImages"):
        smi.distill(vit, small_student(vit), [1, 2], **QUICK)
    with pytest.raises(InputError, match="made for another model"):
        smi.distill(small_vit(patch_size=8), small_vit(patch_size=8), images, **QUICK)
    with pytest.raises(InputError, match="labels up to 8, but the teacher has 5 classes"):
        smi.distill(vit, small_student(vit), make_images(classes=9), **QUICK)


def test_divergence_that_explodes_is_said(vit, images):
    with pytest.raises(RunError, match="lower the learning rate"):
        smi.distill(vit, small_student(vit), images, **{**QUICK, "preset": "published", "steps": 200}, lr=1e6)


# the command


def test_the_command(tmp_path, capsys):
    pytest.importorskip("sklearn")
    small = ["--iterations", "4", "-n", "4", "--division", "2"]
    assert run(["invert", "-o", str(tmp_path / "images"), *small]) == 0
    train = ["--preset", "adamw", "--steps", "4", "--student-batch", "4", "--json"]
    capsys.readouterr()
    assert run(["distill", str(tmp_path / "images"), "-o", str(tmp_path / "a"), "--student", "teacher", "--eval", "digits", *train]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 4
    assert 0 <= result["accuracy"] <= 1
    assert result["evaluation"]["data"] == "digits"
    assert result["evaluation"]["preprocessing"]["crop_mode"] == "center"
    assert run(["distill", "-o", str(tmp_path / "b"), "--refresh-every", "2", *small, *train]) == 0
    assert run(["invert", "-o", str(tmp_path / "c"), "--model", str(tmp_path / "b"), *small]) == 0
    assert SparseImages.load(tmp_path / "c").provenance["model"] == "small"
    capsys.readouterr()
    assert run(["distill", str(tmp_path / "images"), "-o", str(tmp_path / "d"), "--refresh-every", "2", *train]) == 2
    assert "leave out the folder" in capsys.readouterr().err
