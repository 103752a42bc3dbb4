"""Quantisation: torchao's graph against arithmetic by hand, int8 against the simulation, files, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention as StandardAttention

import smi
from smi.cli.main import run
from smi.errors import InputError, RunError
from smi.images.sparse_images import SparseImages
from smi.quantization import accuracy, calibrate, load_quantized
from smi.quantization.int8 import SAFE, Int8Linear, products_saturate
from smi.quantization.model import as_patches
from smi.quantization.recipe import Recipe
from tests.conftest import VARIANTS, small_vit

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def model():
    return small_vit(depth=1)


@pytest.fixture(scope="module")
def sparse(model):
    return smi.invert(model, method="smi", num_images=6, iterations=8, progress=False)


@pytest.fixture(scope="module")
def simulated(model, sparse):
    return smi.quantize(model, sparse)


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def by_hand(model, patches, index, bits, ranges=None):
    """Logits with weights rounded per row and inputs rounded per tensor, over the ranges that they have in float: the recipe, written out."""
    weight_bits, activation_bits = bits
    seen = []

    def linear(x, layer, weight=None):
        weight = layer.weight if weight is None else weight
        seen.append((x.min().clamp(max=0), x.max().clamp(min=0)))
        if ranges is None:
            return F.linear(x, weight, layer.bias)
        low, high = ranges[len(seen) - 1]
        most = 2 ** (weight_bits - 1) - 1
        scale = weight.abs().amax(1, keepdim=True) / most
        step = (high - low) / (2**activation_bits - 1)
        zero = -torch.round(low / step)
        codes = torch.clamp(torch.round(x / step) + zero, 0, 2**activation_bits - 1)
        return F.linear((codes - zero) * step, torch.round(weight / scale) * scale, layer.bias)

    embed, (block,) = model.patch_embed.proj, model.blocks
    x = linear(patches.flatten(2), embed, embed.weight.flatten(1)) + model.pos_embed[0, 1:][index]
    x = torch.cat([(model.cls_token[0] + model.pos_embed[0, :1]).expand(len(x), 1, -1), x], 1)
    q, k, v = linear(block.norm1(x), block.attn.qkv).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    x = x + linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), block.attn.proj)
    x = x + linear(F.gelu(linear(block.norm2(x), block.mlp.fc1)), block.mlp.fc2)
    logits = linear(model.norm(x)[:, 0], model.head)
    return logits if ranges else by_hand(model, patches, index, bits, seen)


@pytest.mark.parametrize("bits", [(8, 8), (3, 5)])
def test_the_simulation_is_the_recipe(model, sparse, bits):
    quantised = smi.quantize(model, sparse, weight_bits=bits[0], activation_bits=bits[1])
    with torch.no_grad():
        expected = by_hand(model, sparse.patches, sparse.index, bits)
        far = (quantised(sparse) - expected).norm(dim=1) / expected.norm(dim=1)
        assert far.median() < 1e-4  # of an image or two a value lies on a half, and a code is the next one
        assert distance(quantised(sparse), expected) < 0.02
        assert distance(expected, smi.forward_sparse(model, sparse)) > 1e-3


def test_sparse_and_dense_of_any_size(model, simulated, sparse, images):
    with torch.no_grad():
        assert distance(simulated(images), model(images)) < 0.15
        assert distance(simulated(sparse), smi.forward_sparse(model, sparse)) < 0.05
        pair = (sparse.patches[:1, :1], sparse.index[:1, :1])
        assert distance(simulated(pair), smi.forward_sparse(model, pair)) < 0.15
    torch.testing.assert_close(simulated(images)[2:3], simulated(images[2:3]))
    assert simulated.int8()(images[:0]).shape == simulated(images[:0]).shape == (0, 5)


def test_calibration_sees_retained_patches_only(model, sparse):
    """What lies under the cells that an image lacks changes nothing; what it keeps does."""
    quantised = smi.quantize(model, (sparse.patches, sparse.index))
    other = smi.quantize(model, (3 * sparse.patches, sparse.index))
    assert torch.equal(quantised(sparse), smi.quantize(model, sparse, batch_size=4)(sparse))
    assert not torch.equal(quantised(sparse), other(sparse))


@pytest.mark.parametrize("kinds", [("distilled", "layer scale", "query-key norm"), ("QuickGELU", "CLIP")])
def test_int8_is_the_simulation_up_to_rounding(kinds, images):
    options = {name: value for kind in kinds for name, value in VARIANTS[kind].items()}
    quantised = smi.quantize(small_vit(**{"depth": 1, **options}), images)
    tolerance = 0.08 if products_saturate() else 1e-2  # seven bits for weights; a code may fall on the other side of a half
    assert distance(quantised.int8()(images), quantised(images)) < tolerance


@pytest.mark.parametrize("post", [("none", ""), ("gelu", "none"), ("gelu", "tanh")])
def test_an_int8_layer_is_exact_integer_arithmetic(post):
    """Also with codes that overflow where two products of bytes are added in 16 bits."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (9, 33), generator=generator, dtype=torch.int8)
    codes[:4] = 127
    bias = torch.randn(9, generator=generator)
    tensors = {"fc.codes": codes, "fc.scales": torch.full((9,), 1e-4), "fc.bias": bias}
    layer = Int8Linear("fc", tensors, (0.02, 120), Recipe())
    x = torch.randn(3, 7, 33, generator=generator)
    x[0] = 9.0
    coded = torch.clamp(torch.round(x / 0.02) + 120, 0, 255)
    assert torch.equal(layer.quantise(x), coded.to(torch.uint8))
    kept = torch.round(codes.double() * (SAFE / 127)) * (127 / SAFE) if products_saturate() else codes.double()
    expected = ((coded.double() - 120) * 0.02) @ (kept * 1e-4).T + bias
    expected = expected if post[0] == "none" else F.gelu(expected, approximate=post[1])
    assert distance(layer.multiply(layer.quantise(x), post=post), expected) < 1e-5
    assert distance(layer(x), F.linear((coded - 120) * 0.02, codes * 1e-4, bias)) < 0.02


def test_it_answers_the_same_in_a_new_process(simulated, images, tmp_path):
    simulated.int8().save(tmp_path / "int8")
    simulated.save(tmp_path / "simulated")
    code = f"""
import torch, smi
images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
torch.save([smi.load_quantized("{tmp_path}/" + kind)(images) for kind in ("int8", "simulated")], "{tmp_path}/answers.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    int8, simulation = torch.load(tmp_path / "answers.pt", weights_only=True)
    assert torch.equal(int8, simulated.int8()(images))
    torch.testing.assert_close(simulation, simulated(images))
    assert load_quantized(tmp_path / "simulated").facts == simulated.facts
    assert torch.equal(load_quantized(tmp_path / "simulated").int8()(images), int8)


def test_other_ranges(model, images):
    """An outlier stretches min-max; percentile and mean square do not follow it, and the error is smaller."""
    calibration = images.clone()
    calibration[0, 0, 0, 0] = 60.0
    kinds = ("minmax", "percentile", "mse")
    with torch.no_grad():
        errors = {ranges: distance(smi.quantize(model, calibration, activation_bits=4, ranges=ranges)(images), model(images)) for ranges in kinds}
    assert max(errors["percentile"], errors["mse"]) < errors["minmax"]
    narrow = [smi.quantize(model, images, weight_bits=3, weight_ranges=ranges) for ranges in ("minmax", "mse")]
    with torch.no_grad():
        weight = model.blocks[0].mlp.fc1.weight
    scale, better = (part.tensors()["blocks.0.mlp.fc1.scales"] for part in narrow)
    assert (better <= scale * 1.0001).all()
    error = [(torch.clamp(torch.round(weight / s[:, None]), -3, 3) * s[:, None] - weight).square().sum() for s in (scale, better)]
    assert error[1] < error[0]


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "init_values": 0.1, "reg_tokens": 2}])
def test_attention_products_too(options, images, monkeypatch):
    """The network computes what torchao's graph does, bit for bit, and the graph quantises both operands of both GEMMs."""
    graphs, (prepare, convert, quantizer) = [], calibrate._torchao()
    monkeypatch.setattr(calibrate, "_torchao", lambda: (prepare, lambda graph: (graphs.append(convert(graph)), graphs[-1])[1], quantizer))
    model = small_vit(depth=1, **options)
    whole = smi.quantize(model, images, attention=True, activation_bits=3)
    with torch.no_grad():
        assert torch.equal(whole(images), graphs[0](*as_patches(whole.facts, images)))
    assert not torch.equal(whole(images), smi.quantize(model, images, activation_bits=3)(images))
    products = [node for node in graphs[0].graph.nodes if node.target is torch.ops.aten.matmul.default]
    assert len(products) == 2
    assert all("dequantize" in str(argument.target) for node in products for argument in node.args)
    assert distance(whole.int8()(images), whole(images)) < (0.08 if products_saturate() else 1e-2)


def test_accuracy_counts(model, images):
    with torch.no_grad():
        labels = model(images).argmax(1)
    assert accuracy(model, images, labels, batch_size=2) == 1.0
    labels[0] = (labels[0] + 1) % 5
    assert accuracy(model, images, labels) == pytest.approx(0.8)
    with pytest.raises(InputError, match="needs images and one label for each, got 0 images"):
        accuracy(model, images[:0], labels[:0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 1}, "weight_bits must be a whole number from 2 to 8, got 1"),
        ({"weight_bits": 16}, "weight_bits must be a whole number from 2 to 8, got 16"),
        ({"activation_bits": 0}, "activation_bits must be a whole number from 2 to 8, got 0"),
        ({"activation_bits": 7.5}, "activation_bits must be"),
        ({"ranges": "best"}, "ranges must be minmax, percentile or mse, got 'best'"),
        ({"weight_ranges": "percentile"}, "weight_ranges must be minmax or mse"),
        ({"percentile": 40}, "percentile must be a number between 50 and 100"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"images": torch.randn(2, 3, 20, 16)}, r"takes images \[B, 3, 16, 16\] of normalised pixels, these are float32 \[2, 3, 20, 16\]"),
        ({"images": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, r"of normalised pixels, these are uint8"),
        ({"images": torch.randn(0, 3, 16, 16)}, "no images to calibrate with"),
        ({"images": torch.full((1, 3, 16, 16), float("nan"))}, "hold NaN or infinity"),
        ({"images": "digits"}, "images must be SparseImages, a tensor"),
        ({"images": (torch.randn(2, 3, 3, 4, 4), torch.full((2, 3), 16))}, "index must name cells of the 4x4 grid, 0 to 15"),
        ({"images": (torch.randn(2, 3, 3, 8, 8), torch.zeros(2, 3, dtype=int))}, r"takes patches \[3, 4, 4\], these are \[3, 8, 8\]"),
    ],
)
def test_bad_settings_are_refused(model, images, settings, message):
    with pytest.raises(InputError, match=message):
        smi.quantize(model, **{"images": images, **settings})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 24}, "has a 4x4 grid of patches, these images are on 6x6"),
        ({"num_classes": 9}, "has 5 classes, these images have labels up to 8"),
        ({"img_size": 32, "patch_size": 8}, r"takes patches \[3, 4, 4\], these are \[3, 8, 8\]"),
    ],
)
def test_images_of_another_model_are_refused(model, options, message):
    images = smi.invert(small_vit(**options), method="gaussian", num_images=2, labels=[options.get("num_classes", 5) - 1], progress=False)
    with pytest.raises(InputError, match=message):
        smi.quantize(model, images)


def test_an_export_that_fails_says_which_module(images):
    class Attention(StandardAttention):
        def forward(self, x, *args, **kwargs):
            return super().forward(x) if x.sum() > 0 else super().forward(x) * 1

    model = small_vit()
    model.blocks[1].attn.__class__ = Attention
    with pytest.raises(RunError, match=r"blocks\.1\.attn cannot be exported"):
        smi.quantize(model, images)


def test_without_torchao_it_says_so(model, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(InputError, match="needs torchao: pip install torchao"):
        smi.quantize(model, images)


def test_damaged_files_are_refused(simulated, tmp_path):
    with pytest.raises(InputError, match=r"no quantised model: there is no quantized\.json"):
        load_quantized(tmp_path)
    simulated.int8().save(tmp_path / "q")
    with pytest.raises(InputError, match="is not empty"):
        simulated.int8().save(tmp_path / "q")
    weights = tmp_path / "q" / "int8.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="is damaged"):
        load_quantized(tmp_path / "q")


def test_by_command(tmp_path, capsys):
    """The digits teacher, noise, W8/A8: accuracy of all three on real digits, and a model on disk."""
    pytest.importorskip("sklearn")
    assert run(["invert", "-o", str(tmp_path / "noise"), "-n", "8", "--method", "gaussian"]) == 0
    capsys.readouterr()
    arguments = ["quantize", "--images", str(tmp_path / "noise"), "--eval", "digits", "-o", str(tmp_path / "q")]
    assert run([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    measured = result["evaluation"]
    assert measured["full_precision"] > 0.97
    assert abs(measured["int8"] - measured["simulated"]) <= 0.01
    assert (result["widths"], result["kind"], result["calibration_images"]) == ("W8/A8", "int8", 8)
    assert isinstance(SparseImages.load(tmp_path / "noise"), SparseImages)
    assert load_quantized(tmp_path / "q").facts.recipe == Recipe()
    assert run(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run(["quantize", "--images", str(tmp_path / "noise"), "--w-bits", "1"]) == 2
    assert "weight_bits must be a whole number from 2 to 8" in capsys.readouterr().err
