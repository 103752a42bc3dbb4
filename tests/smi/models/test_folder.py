"""Models in folders: what is written comes back, and damaged folders are refused."""

import json
import os

import pytest
import timm
import torch
from torch import nn

from smi.errors import InputError
from smi.models.folder import load_model_folder, record_of, save_model
from smi.models.vit import describe
from tests.conftest import VARIANTS, small_vit

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", VARIANTS)
def test_models_come_back_from_their_folder(name, tmp_path):
    model = small_vit(**VARIANTS[name])
    save_model(model, tmp_path, {"made": "here"})
    back = load_model_folder(tmp_path)
    x = torch.randn(2, model.in_chans, *model.patch_embed.img_size)
    with torch.no_grad():
        assert torch.equal(model(x), back(x))
    assert describe(back).mean == describe(model).mean
    assert record_of(tmp_path) == {"made": "here"}


def test_timm_models_come_back_by_their_name(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    save_model(model, tmp_path)
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), load_model_folder(tmp_path)(x))
    with pytest.raises(InputError, match="cannot be written to a folder"):
        save_model(nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": {"timm": "hf_hub:someone/model", "options": {"pretrained": True}}}, "timm has no model"),
        ({"architecture": {"timm": "test_vit", "options": {"checkpoint_path": "x.pth"}}}, "'checkpoint_path' is none of ours"),
        ({"options": {"block_fn": "x"}}, "'block_fn' is none of ours"),
        ({"options": {"depth": 10**9}}, "depth 1000000000 is more than the weights hold"),
        ({"options": {"embed_dim": 10**30}}, "is more than the weights hold"),
        ({"options": {"mlp_ratio": float("nan")}}, "is more than the weights hold"),
        ({"options": {"num_heads": [3]}}, "num_heads is of another type"),
        ({"options": {"img_size": [4000, 4000]}}, "more patches than the weights hold"),
        ({"options": {"img_size": [16]}}, "img_size must be 2 numbers"),
        ({"options": {"img_size": []}}, "img_size must be 2 numbers"),
        ({"statistics": {"mean": [None] * 3}}, "mean must be a number from"),
        ({"statistics": {"std": [10**400] * 3}}, "std must be a positive number"),
        ({"statistics": {"mean": 3}}, "mean must be a sequence"),
        ({"statistics": [1]}, "is damaged"),
        ({"architecture": []}, "is damaged"),
    ],
)
def test_descriptions_from_elsewhere_are_refused_before_anything_is_built(change, reason, tmp_path):
    """A file must neither fetch another model nor ask for one that takes all memory."""
    save_model(small_vit(), tmp_path)
    about = json.loads((tmp_path / "model.json").read_text())
    about["architecture"]["options"] |= change.pop("options", {})
    (tmp_path / "model.json").write_text(json.dumps(about | change))
    with pytest.raises(InputError, match=reason):
        load_model_folder(tmp_path)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    save_model(small_vit(), tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="not a file|no readable"):
        load_model_folder(tmp_path)


def test_damaged_folders(tmp_path):
    with pytest.raises(InputError, match="holds no model"):
        load_model_folder(tmp_path)
    save_model(small_vit(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="is damaged"):
        load_model_folder(tmp_path)
