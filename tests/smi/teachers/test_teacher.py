"""The embedded teacher against real digits."""

import pytest
import torch

from smi.models.vit import describe
from smi.teachers import WEIGHTS, digits, digits_record

pytest.importorskip("sklearn")

from smi.teachers.train_digits import CONFIG, accuracy, load_digits, train  # noqa: E402

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def test_split():
    _, _, images, labels = load_digits()
    record = digits_record()
    return (images - record["mean"]) / record["std"], labels


def test_it_reads_real_digits(test_split):
    measured = accuracy(digits(), *test_split)
    assert measured >= 0.97
    assert measured == pytest.approx(digits_record()["test_accuracy"], abs=0.003)


def test_it_reads_digits_of_which_patches_are_missing(test_split):
    for kept, recorded in digits_record()["test_accuracy_by_share_of_patches_kept"].items():
        assert accuracy(digits(), *test_split, kept=float(kept)) == pytest.approx(recorded, abs=0.005)


def test_its_own_forward_agrees(test_split):
    images, labels = test_split
    with torch.no_grad():
        assert (digits()(images).argmax(1) == labels).double().mean() == pytest.approx(digits_record()["test_accuracy"], abs=0.003)


def test_it_is_what_the_documentation_says():
    vit = describe(digits())
    assert (vit.grid, vit.num_prefix, vit.channels, vit.num_classes, vit.flip) == ((8, 8), 1, 1, 10, False)
    assert WEIGHTS.stat().st_size <= 2_000_000
    assert digits_record()["training"] == CONFIG


def test_no_test_image_is_in_the_training_split():
    train_images, _, test_images, _ = load_digits()
    assert len(train_images) + len(test_images) == 1797
    record = digits_record()
    assert (record["train_images"], record["test_images"]) == (len(train_images), len(test_images))


@pytest.mark.slow
def test_training_learns():
    model, record = train({**CONFIG, "epochs": 6})
    assert record["test_accuracy"] > 0.2  # from 0.1 by chance, in a fortieth of the training
    assert not torch.equal(model.head.weight, digits().head.weight)
