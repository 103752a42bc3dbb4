"""Judging images: agreement and confidence by stage, by another model, and beside real images."""

import json
from dataclasses import replace

import pytest
import torch

import smi
from smi.cli.main import run
from smi.errors import InputError
from smi.evaluate import likeness, random_parts, recognition
from smi.images.patches import to_patches
from smi.images.readers import DenseFillWarning
from smi.images.sparse_images import SparseImages
from tests.conftest import small_vit

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def pri():
    return smi.invert(small_vit(), method="pri", division=4, num_images=24, iterations=8, progress=False)


def dense_images(pixels, labels):
    patches = to_patches(pixels, 4)
    count, cells = patches.shape[:2]
    index = torch.arange(cells).expand(count, -1)
    numbers = torch.arange(count)
    return SparseImages(patches, index, labels, numbers, torch.zeros(count, dtype=torch.int64), (4, 4), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def test_recognition_against_its_definition():
    answers, labels = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 5
    found = recognition(answers, labels)
    p = answers.double().softmax(1)[torch.arange(9), labels]
    assert found.agreement == pytest.approx((answers.argmax(1) == labels).double().mean().item())
    assert found.confidence == pytest.approx(p.mean().item())
    assert found.cross_entropy == pytest.approx(-p.log().mean().item())


def test_stages_in_the_order_of_their_emission(pri):
    result = smi.evaluate(pri, small_vit())
    assert len(result.stages) == 4
    assert [stage.images for stage in result.stages] == [6, 6, 6, 6]
    with torch.no_grad():
        right = smi.forward_sparse(small_vit(), pri).argmax(1) == pri.labels
    for number, stage in enumerate(result.stages):
        assert stage.agreement == pytest.approx(right[pri.stage == number].double().mean().item())
    assert result.teacher.agreement == pytest.approx(right.double().mean().item())
    assert result.random.images == 24
    json.dumps(result.record())


def test_random_parts_are_the_same_patches_in_other_company(pri):
    parts = random_parts(pri, seed=1)
    assert parts.index.shape == pri.index.shape
    assert not torch.equal(parts.index, pri.index)
    for number in range(6):
        mine, theirs = parts[parts.trajectory == number], pri[pri.trajectory == number]
        assert sorted(mine.index.flatten().tolist()) == sorted(theirs.index.flatten().tolist()) == list(range(16))
        assert torch.equal(mine.labels, theirs.labels)
        by_cell = dict(zip(theirs.index.flatten().tolist(), theirs.patches.flatten(0, 1), strict=True))
        assert all(torch.equal(by_cell[int(cell)], patch) for cell, patch in zip(mine.index.flatten(), mine.patches.flatten(0, 1), strict=True))
        assert torch.equal(mine.index, mine.index.sort(1).values)
    assert torch.equal(random_parts(pri, seed=1).index, parts.index)
    with pytest.raises(InputError, match="no trajectory has all its stages"):
        random_parts(pri[pri.stage > 0])


def test_another_model_judges(pri):
    teacher, other = small_vit(), small_vit(seed=1)
    same = smi.evaluate(pri, teacher, verifier=teacher).verifier
    assert same.same_answer == 1.0
    assert same.reads == "retained patches"
    verdict = smi.evaluate(pri, teacher, verifier=other).verifier
    with torch.no_grad():
        answers = smi.forward_sparse(other, pri).argmax(1)
        wanted = smi.forward_sparse(teacher, pri).argmax(1)
    assert verdict.same_answer == pytest.approx((answers == wanted).double().mean().item())
    with pytest.warns(DenseFillWarning, match="the verifier is no ViT"):
        filled = smi.evaluate(pri, teacher, verifier=small_vit(patch_size=8)).verifier
    assert filled.reads == "filled images"


def test_likeness_is_that_to_the_nearest_real_image_of_the_class():
    g = torch.Generator().manual_seed(0)
    real, labels = torch.randn(6, 3, 16, 16, generator=g), torch.tensor([0, 0, 1, 1, 2, 2])
    same = likeness(dense_images(real[[1, 2]], labels[[1, 2]]), real, labels)
    assert same.images == 2
    assert same.psnr > 80
    assert same.ssim == pytest.approx(1.0, abs=1e-3)
    other = likeness(dense_images(real[[1, 2]], torch.tensor([1, 0])), real, labels)
    assert other.psnr < 20
    assert other.ssim < 0.5


def test_sparse_images_are_compared_where_they_have_pixels(pri):
    real = pri[:4].to_dense()
    real = torch.where(real == 0, 3.0, real)  # other than the images wherever patches are missing
    found = likeness(pri[:4], real, pri.labels[:4])
    assert found.psnr > 80
    assert found.ssim is None
    with pytest.raises(InputError, match="real images must be"):
        likeness(pri, torch.zeros(1, 3, 8, 8), torch.zeros(1))
    with pytest.raises(InputError, match="none of the classes"):
        likeness(pri, torch.zeros(1, 3, 16, 16), torch.tensor([77]))
    with pytest.raises(InputError, match="as many labels"):
        likeness(pri, torch.zeros(0, 3, 16, 16), torch.zeros(0))


@pytest.mark.filterwarnings("ignore::smi.images.readers.DenseFillWarning")
def test_what_does_not_fit(pri):
    with pytest.raises(InputError, match="there are no images"):
        smi.evaluate(pri[:0], small_vit())
    with pytest.raises(InputError, match="the model takes 1 channels, but the images have 3"):
        smi.evaluate(pri, small_vit(in_chans=1))
    with pytest.raises(InputError, match="labels up to 9, but the model has 5 classes"):
        smi.evaluate(replace(pri, labels=torch.full_like(pri.labels, 9)), small_vit())
    with pytest.raises(InputError, match="the verifier has 7 classes, the model 5"):
        smi.evaluate(pri, small_vit(), verifier=small_vit(num_classes=7))
    with pytest.raises(InputError, match="the verifier cannot take images of 3x16x16"):
        smi.evaluate(pri, small_vit(), verifier=small_vit(img_size=24))


def test_the_command(tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert run(["invert", "-o", str(tmp_path), "-n", "4", "--division", "2", "--iterations", "4"]) == 0
    capsys.readouterr()
    assert run(["evaluate", str(tmp_path), "--verifier", "digits", "--against", "digits", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["stages"]) == 2
    assert result["verifier"]["same_answer"] == 1.0
    assert result["likeness"]["psnr"] > 0
    assert run(["evaluate", str(tmp_path)]) == 0
    assert "patches at random" in capsys.readouterr().out
    assert run(["evaluate", str(tmp_path / "no")]) == 2
    assert "holds no sparse images" in capsys.readouterr().err
