"""Checkpoints as training scripts write them: what is around the weights, in front of their names, and of another size."""

import argparse
import collections
import datetime
import json
import pathlib
import types

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from smi.errors import InputError
from smi.models.by_name import load_model
from smi.models.checkpoint import read_weights

pytestmark = pytest.mark.fast
NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=3).eval()


@pytest.fixture
def weights():
    return {name: torch.randn(2, 2) for name in ("cls_token", "patch_embed.proj.weight", "head.weight")}


def same(found, weights):
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


VALUES = {
    "a namespace": argparse.Namespace(lr=1e-3, model="deit", nested=argparse.Namespace(a=[1])),
    "a simple namespace": types.SimpleNamespace(lr=1e-3),
    "a path": pathlib.Path("out/run"),
    "NumPy's numbers": {"best": np.float64(0.5), "epoch": np.int64(3), "done": np.bool_(True)},
    "an array": np.arange(3.0),
    "a date": datetime.datetime(2024, 1, 2),
    "a counter": collections.Counter(a=1),
    "an optimiser": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
}


@pytest.mark.parametrize("beside", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("zipped", [True, False])
def test_values_beside_the_weights(beside, zipped, weights, tmp_path):
    allowed = set(torch.serialization.get_safe_globals())
    torch.save({"state_dict": weights, "args": beside}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert same(read_weights(tmp_path / "w.pth"), weights)
    assert set(torch.serialization.get_safe_globals()) == allowed


class Settings:
    """A class of a training script."""


def test_other_objects_are_refused_by_name(weights, tmp_path):
    torch.save({"state_dict": weights, "config": Settings()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"it holds a [\w.]*Settings, which is no data"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("averaged", "plain"),
    [
        ("state_dict_ema", "state_dict"),
        ("model_ema", "model"),
        ("model_ema", "state_dict"),
        ("ema_state_dict", "model_state_dict"),
        ("teacher", "student"),
    ],
)
def test_averaged_weights_are_preferred_as_timm_prefers_them(averaged, plain, weights, tmp_path):
    ema = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({plain: weights, averaged: ema}, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), ema)
    if averaged in ("state_dict_ema", "model_ema"):
        assert same(timm.models.load_state_dict(str(tmp_path / "w.pth")), ema)
    torch.save({plain: weights, averaged: None}, tmp_path / "w.pth")  # a run without averaging
    if plain != "student":
        assert same(read_weights(tmp_path / "w.pth"), weights)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone.", "encoder.", "module.backbone.", "model.vit.", "visual.trunk."],
)
def test_prefixes(prefix, weights, tmp_path):
    torch.save({"model": prefixed(weights, prefix)}, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), weights)
    part = prefixed({name: weights[name] for name in ("cls_token", "patch_embed.proj.weight")}, prefix)
    save_file({**part, "head.weight": weights["head.weight"]}, tmp_path / "w.safetensors")  # a head of its own beside the backbone
    assert same(read_weights(tmp_path / "w.safetensors"), weights)


def test_containers_in_containers_and_counters(weights, tmp_path):
    torch.save({"model_ema": {**prefixed(weights, "module."), "n_averaged": torch.tensor(3)}}, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), weights)
    torch.save({"state_dict": {"model": weights}}, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), weights)


def test_two_models_in_one_are_refused(weights, tmp_path):
    torch.save({**prefixed(weights, "student."), **prefixed(weights, "teacher.")}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"holds several models, student\., teacher\."):
        read_weights(tmp_path / "w.pth")
    torch.save({**prefixed(weights, "backbone."), "head.weight": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="the same name"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("options", [{"in_chans": 1}, {"global_pool": "avg"}, {"num_classes": 7, "in_chans": 2}], ids=str)
def test_the_file_decides(options, tmp_path):
    torch.manual_seed(1)
    made = timm.create_model(NAME, **options).eval()
    save_file(made.state_dict(), tmp_path / "w.safetensors")
    found = load_model(NAME, checkpoint=tmp_path / "w.safetensors")
    images = torch.randn(1, options.get("in_chans", 3), 224, 224)
    with torch.no_grad():
        assert torch.equal(found(images), made(images))


@pytest.mark.parametrize("size", [(160, 160), (96, 128)])
def test_positions_of_another_size_are_resized_as_timm_does(size, whole, tmp_path):
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    found = load_model(NAME, checkpoint=tmp_path / "w.safetensors", image_size=size)
    grid = [side // 16 for side in size]
    assert found.patch_embed.grid_size == tuple(grid)
    assert torch.equal(found.pos_embed, resample_abs_pos_embed(whole.pos_embed, new_size=grid, num_prefix_tokens=1))


def test_a_folder_of_timms_form(whole, tmp_path):
    """Also one whose weights are a pickle of code, which is not run."""
    config = {"architecture": NAME, "num_classes": 3, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4] * 3, "crop_pct": 0.9}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"holds no weights: there is no model\.safetensors"):
        load_model(f"local-dir:{tmp_path}")
    torch.save(Settings(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="which is no data"):
        load_model(f"local-dir:{tmp_path}")
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    found = load_model(f"local-dir:{tmp_path}")
    assert torch.equal(found.head.weight, whole.head.weight)
    assert found.pretrained_cfg["crop_pct"] == 0.9
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "no_such_model"}))
    with pytest.raises(InputError, match="cannot be built"):
        load_model(f"local-dir:{tmp_path}")
