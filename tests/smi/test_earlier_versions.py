"""Folders that version 0.1.0 wrote (tests/data/0.1.0) load, and give the answers that they gave then."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import smi
from smi.distillation import small_student
from smi.errors import InputError
from smi.inversion.snapshots import load_progress
from smi.models.folder import load_model_folder, record_of

pytestmark = pytest.mark.fast

EARLIER = Path(__file__).parents[1] / "data" / "0.1.0"
ANSWERS = json.loads((EARLIER / "answers.json").read_text())
PIXELS = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)


def close(found, name, tolerance=1e-5):
    torch.testing.assert_close(found.detach(), torch.tensor(ANSWERS[name]), rtol=tolerance, atol=tolerance)


def test_a_model():
    close(load_model_folder(EARLIER / "model")(PIXELS), "model")
    assert record_of(EARLIER / "model") == {"made": "by 0.1.0"}


def test_images_and_their_progress():
    images = smi.SparseImages.load(EARLIER / "images")
    assert (len(images), images.grid, images.labels.tolist(), images.stage.tolist()) == (4, (2, 2), [2, 2, 1, 1], [0, 1, 0, 1])
    assert images.patches.double().sum().item() == pytest.approx(ANSWERS["patches_sum"])
    assert images.provenance["method"] == "pri"
    assert len(load_progress(EARLIER / "images", images.provenance["run"]).iterations) == 2
    assert smi.forward_sparse(load_model_folder(EARLIER / "model"), images).shape == (4, 3)


def test_quantised_models():
    close(smi.load_quantized(EARLIER / "int8")(PIXELS), "int8", 0.05)  # where int8 GEMMs overflow, weights have seven bits
    with pytest.raises(InputError, match=r"a simulation of version 0\.1\.0, a torch\.export archive.* make it again with smi\.quantize"):
        smi.load_quantized(EARLIER / "simulated")


@pytest.mark.parametrize("run", ["distilled", "distilling"])
def test_a_distillation_goes_on(run, tmp_path):
    """One that had ended gives its result; one that was killed after three of four steps takes the fourth."""
    teacher, images = load_model_folder(EARLIER / "model"), smi.SparseImages.load(EARLIER / "images")
    student = small_student(teacher, embed_dim=8, depth=1, num_heads=2, mlp_ratio=2)
    folder, taken = shutil.copytree(EARLIER / run, tmp_path / run), []
    result = smi.distill(
        teacher, student, images, output=folder, steps=4, eval_every=2, progress=False, on_step=lambda step, loss: taken.append(step)
    )
    assert taken == ([] if run == "distilled" else [3, 4])
    close(result.student(PIXELS), "student", 1e-4)
