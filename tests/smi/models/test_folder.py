"""Models in folders: what is written comes back, and damaged folders are refused."""

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


def test_damaged_folders(tmp_path):
    with pytest.raises(InputError, match="holds no model"):
        load_model_folder(tmp_path)
    save_model(small_vit(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="is damaged"):
        load_model_folder(tmp_path)
