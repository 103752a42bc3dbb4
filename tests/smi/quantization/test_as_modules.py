"""A quantised model is a module like another: modes, copies, files of torch, states, devices."""

import copy
import io
import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import smi
from smi.errors import InputError
from smi.quantization import load_quantized
from tests.conftest import small_vit

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def simulated(images):
    return smi.quantize(small_vit(depth=1, qk_norm=True), images)


@pytest.fixture(params=["simulated", "int8"])
def quantised(request, simulated):
    return simulated if request.param == "simulated" else simulated.int8()


def test_modes_change_nothing(quantised, images):
    expected = quantised(images)
    assert not quantised.eval().training
    assert quantised.train().training
    assert torch.equal(quantised(images), expected)
    assert next(quantised.parameters()).device == torch.device("cpu")
    assert not any(parameter.requires_grad for parameter in quantised.parameters())
    with pytest.raises(InputError, match="calibrated, not trained"):
        quantised.requires_grad_()


def test_copies(quantised, images):
    """deepcopy and torch.save, before and after the first pass."""
    expected = quantised(images)
    file = io.BytesIO()
    torch.save(quantised, file)
    file.seek(0)
    for other in (copy.deepcopy(quantised), torch.load(file, weights_only=False)):  # the test's own file
        assert torch.equal(other(images), expected)
        assert other.facts == quantised.facts


def test_a_state_is_the_whole_of_it(quantised, images):
    """Also the scales of the activations, which another calibration sets otherwise, and what int8 has laid out before."""
    other = smi.quantize(small_vit(seed=3, depth=1, qk_norm=True), 3 * images)
    other = other.int8() if quantised.KIND == "int8" else other
    assert not torch.equal(other(images), quantised(images))
    other.load_state_dict(quantised.state_dict())
    assert torch.equal(other(images), quantised(images))
    assert other.inputs() == quantised.inputs()


def test_it_moves_but_keeps_its_precision(quantised, images):
    expected = quantised(images)
    assert torch.equal(quantised.to("cpu", torch.float32).cpu().float()(images), expected)
    for move in (quantised.half, quantised.double, lambda: quantised.to(torch.bfloat16)):
        with pytest.raises(InputError, match="computes in float32, not"):
            move()
    assert torch.equal(quantised(images), expected)


def test_folders(quantised, images, tmp_path):
    assert torch.equal(load_quantized(quantised.save(tmp_path / "q"))(images), quantised(images))
    assert {path.suffix for path in (tmp_path / "q").iterdir()} == {".json", ".safetensors"}


class Payload:
    """Unpickled it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.folder),)


def test_a_simulation_of_0_1_0_is_refused_unread(simulated, tmp_path):
    folder, made = simulated.save(tmp_path / "q"), tmp_path / "made by the file"
    manifest = json.loads((folder / "quantized.json").read_text())
    (folder / "quantized.json").write_text(json.dumps({**manifest, "format": "smi.Quantized/1"}))
    payload = io.BytesIO()
    torch.save(Payload(made), payload)
    with zipfile.ZipFile(folder / "simulated.pt2", "w") as archive:
        archive.writestr("archive/data/sample_inputs/model.pt", payload.getvalue())
    with pytest.raises(InputError, match=r"version 0\.1\.0, a torch\.export archive.* make it again with smi\.quantize"):
        load_quantized(folder)
    assert not made.exists()


@pytest.mark.parametrize(
    "facts",
    [
        {"grid": [-4, 4]},
        {"grid": [4, 10**8]},
        {"channels": 0},
        {"num_classes": "5"},
        {"patch_size": 1e400},
        {"name": ["x"]},
        {"recipe": {"weight_bits": 64}},
        {"architecture": {"depth": 10**9}},
        {"architecture": {"num_heads": 0}},
        {"architecture": {"num_heads": 7}},
        {"architecture": {"heads": 3}},
        {"architecture": {"pool": "../x"}},
        {"architecture": {"activation": "eval"}},
        {"architecture": {"eps": {"norm": -1.0}}},
        {"architecture": {"eps": {"__class__": 1.0}}},
    ],
    ids=str,
)
def test_facts_that_no_model_has_are_refused(simulated, facts, tmp_path):
    folder = simulated.save(tmp_path / "q")
    manifest = json.loads((folder / "quantized.json").read_text())
    held = manifest["facts"]
    for name, value in facts.items():
        held[name] = {**held[name], **value} if isinstance(value, dict) else value
    (folder / "quantized.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is damaged"):
        load_quantized(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update(forward=torch.zeros(3)),
        lambda tensors: tensors.pop("prefix"),
        lambda tensors: tensors.pop("embed.scales"),
        lambda tensors: tensors["prefix"].fill_(float("nan")),
        lambda tensors: tensors["blocks.0.attn.qkv.codes"].fill_(-128),
        lambda tensors: tensors.update({"heads.0.codes": tensors["heads.0.codes"][:-1]}),
        lambda tensors: tensors.update({"heads.0.codes": tensors["heads.0.codes"].float()}),
        lambda tensors: tensors.update({"blocks.0.mlp.fc2.codes": torch.zeros(24, 0, dtype=torch.int8)}),
    ],
    ids=["extra", "missing", "no scales", "nan", "code", "rows", "float codes", "empty"],
)
def test_tensors_that_do_not_fit_are_refused(simulated, change, tmp_path):
    folder = simulated.save(tmp_path / "q")
    tensors = load_file(folder / "simulated.safetensors")
    change(tensors)
    save_file(tensors, folder / "simulated.safetensors")
    with pytest.raises(InputError, match="is damaged"):
        load_quantized(folder)


@pytest.mark.parametrize(
    "inputs", [{}, {"embed": [0.0, 0]}, {"embed": [1e999, 0]}, {"embed": [1.0, 256]}, {"embed": [1.0]}, {"embed": None}], ids=str
)
def test_scales_that_do_not_fit_are_refused(simulated, inputs, tmp_path):
    folder = simulated.save(tmp_path / "q")
    manifest = json.loads((folder / "quantized.json").read_text())
    manifest["inputs"] = {**manifest["inputs"], **inputs} if inputs else inputs
    (folder / "quantized.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is damaged"):
        load_quantized(folder)


def test_a_quantised_model_judges_images(quantised, recwarn):
    """As verifier it reads the retained patches, like the ViT that it is."""
    model = small_vit(depth=1, qk_norm=True)
    sparse = smi.invert(model, method="smi", num_images=4, iterations=4, progress=False)
    found = smi.evaluate(sparse, model, verifier=quantised)
    assert found.verifier.reads == "retained patches"
    assert found.verifier.recognition.agreement == (quantised(sparse).argmax(1) == sparse.labels).double().mean().item()
    assert smi.evaluate(sparse, quantised).teacher == found.verifier.recognition
    assert not [warning for warning in recwarn if "training mean" in str(warning.message)]
