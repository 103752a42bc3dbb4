"""Which level a model is at."""

import pytest
import timm

import smi
from smi.errors import InputError
from smi.models.levels import METHODS, read_model
from tests.conftest import small_vit


@pytest.mark.fast
def test_levels_of_models_in_hand():
    native, module = smi.describe(small_vit()), smi.describe(timm.create_model("resnet18", num_classes=3), image_size=(32, 32))
    assert (native.level, module.level) == ("native", "module")
    assert "not supported" in module.reason
    assert (native.methods, module.methods) == (METHODS["native"], ("dense", "gaussian"))
    headless = smi.describe(timm.create_model("resnet18", num_classes=0))
    assert headless.level == "refused"
    assert "no classifier head" in headless.reason
    with pytest.raises(InputError, match="must be a torch.nn.Module"):
        smi.describe("resnet18")


@pytest.mark.fast
def test_a_vit_takes_its_own_image_size():
    vit = small_vit()
    height, width = vit.patch_embed.img_size
    assert read_model(vit, image_size=(height, width))[0].image_size == (height, width)
    with pytest.raises(InputError, match="leave out image_size"):
        read_model(vit, image_size=(height + 16, width))
