"""The reparametrised recipe: the float model stays, channels share a range, softmax weights have steps of half a power of two, few bits suffice."""

import pytest
import torch
from torch import nn

import smi
from smi.errors import InputError
from smi.images.patches import to_patches
from smi.quantization import load_quantized
from smi.quantization.export import Tokens
from smi.quantization.network import LogCodes
from smi.quantization.recipe import PUBLISHED, REPARAMETRIZED, Recipe
from smi.quantization.reparametrize import reparametrize
from tests.conftest import VARIANTS, small_vit

pytest.importorskip("torchao")
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
PAIR = to_patches(IMAGES, 4), torch.arange(16).expand(6, -1)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def outlying(**options):
    """A model with LayerNorm channels of very different ranges, as trained ones have."""
    model = small_vit(depth=1, **options)
    with torch.no_grad():
        for norm, layer in ((model.blocks[0].norm1, model.blocks[0].attn.qkv), (model.blocks[0].norm2, model.blocks[0].mlp.fc1)):
            scale = torch.logspace(-1.5, 1.5, 24)
            norm.weight *= scale
            norm.bias += 0.5 * scale
            layer.weight /= scale
    return model


@pytest.mark.parametrize("options", [{}, VARIANTS["no qkv bias"]], ids=str)
def test_answers_stay_and_channels_share_a_range(options):
    model = outlying(**options)
    tokens, ranges = Tokens(model, fused_attention=False), []
    with torch.no_grad():
        reparametrize(tokens, [(PAIR[0][:2], PAIR[1][:2]), (PAIR[0][2:], PAIR[1][2:])])
        tokens.blocks[0].norm1.register_forward_hook(lambda _, __, x: ranges.append(x.flatten(0, 1).aminmax(dim=0)))
        assert distance(tokens(*PAIR), model(IMAGES)) < 1e-4
    (low, high) = ranges[0]
    torch.testing.assert_close(low, low.mean().expand(24), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(high, high.mean().expand(24), rtol=1e-3, atol=1e-3)
    assert isinstance(model.blocks[0].norm1, nn.LayerNorm)
    assert torch.equal(model.blocks[0].norm1.weight, outlying(**options).blocks[0].norm1.weight)  # the user's model is as before


def test_softmax_weights_in_half_powers_of_two():
    codes = LogCodes("weights", (0.5 / 15, 0), Recipe(activation_bits=4, name=REPARAMETRIZED))
    given = torch.tensor([0.5, 0.9, 0.25, 0.5 * 2**-0.5, 0.5 * 2**-0.7, 0.5 * 2**-7.5, 0.5 * 2**-7.8, 0.0])
    expected = torch.tensor([0.5, 0.5, 0.25, 0.5 * 2**-0.5, 0.5 * 2**-0.5, 0.5 * 2**-7.5, 0.0, 0.0])
    torch.testing.assert_close(codes.simulated(given), expected)


def test_few_bits_suffice(tmp_path):
    """Where channels differ, four bits lose less than with one scale for all of them; integers and files are the simulation."""
    model = outlying()
    about = {"weight_bits": 8, "activation_bits": 4}
    better, plain = smi.quantize(model, IMAGES, recipe=REPARAMETRIZED, **about), smi.quantize(model, IMAGES, attention=True, **about)
    with torch.no_grad():
        assert distance(better(IMAGES), model(IMAGES)) < 0.7 * distance(plain(IMAGES), model(IMAGES))
    assert distance(better.int8()(IMAGES), better(IMAGES)) < 0.1
    assert torch.equal(load_quantized(better.save(tmp_path / "q"))(IMAGES), better(IMAGES))


def test_a_source_is_seen_from_its_first_round():
    asked = []
    found = smi.quantize(outlying(), lambda number: (asked.append(number), IMAGES)[1], recipe=REPARAMETRIZED, max_images=18)
    assert asked == [0, 1, 2, 3]  # of which calibration saw three
    assert found.facts.calibration["images"] == 18


def test_its_attention_is_its_own():
    for recipe in (REPARAMETRIZED, PUBLISHED):
        with pytest.raises(InputError, match=f"the recipe {recipe} says itself what of attention"):
            smi.quantize(small_vit(), IMAGES, recipe=recipe, attention=True)
