"""The published recipe: the simulation against a naive implementation in float64, its points, files, other ranges, and the integer model."""

import json

import pytest
import torch
import torch.nn.functional as F

import smi
from smi.errors import InputError
from smi.quantization import load_quantized
from smi.quantization.int8 import products_saturate
from smi.quantization.network import Codes
from smi.quantization.recipe import LINEAR_INPUTS, PUBLISHED
from tests.conftest import VARIANTS, small_vit

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def model():
    return small_vit(depth=2)


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def published(model, images):
    return smi.quantize(model, images, recipe=PUBLISHED)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


class Naive:
    """The protocol in float64, as it is written down: one pass that watches every point, then passes that round at every point."""

    def __init__(self, model, weight_bits, activation_bits):
        self.model, self.weight_bits, self.activation_bits = model.double(), weight_bits, activation_bits
        self.ranges, self.trace, self.watching, self.made = {}, [], True, {}

    def point(self, name, x):
        if self.watching:
            self.ranges[name] = (x.min().item(), x.max().item())
            return x
        low, high = self.ranges[name]
        scale = (high - low) / (2**self.activation_bits - 1)
        zero = min(max(-round(low / scale), 0), 2**self.activation_bits - 1)
        rounded = (torch.clamp(torch.round(x / scale + zero), 0, 2**self.activation_bits - 1) - zero) * scale
        self.trace.append((name, x, rounded))
        return rounded

    def linear(self, name, layer, x):
        weight = layer.weight.flatten(1)
        if not self.watching:
            least, most = -(2 ** (self.weight_bits - 1)), 2 ** (self.weight_bits - 1) - 1
            scale = weight.abs().amax(1, keepdim=True) / ((most - least) / 2)
            codes, found = torch.clamp(torch.round(weight / scale), least, most), self.made[f"{name}.codes"]
            on_a_half = ((weight / scale).abs() % 1 - 0.5).abs() < 1e-4  # as the largest weight of a row is: either code
            assert torch.equal(codes[~on_a_half], found[~on_a_half].double())
            assert (codes - found).abs().max() <= 1
            weight = found * scale
        return x @ weight.T + layer.bias

    @torch.no_grad()
    def __call__(self, images):
        m, point = self.model, self.point
        patches = images.double().unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
        x = point("tokens", torch.cat([m.cls_token.expand(len(images), -1, -1), self.linear("embed", m.patch_embed.proj, patches)], 1))
        x = point("embedded", x + point("positions", m.pos_embed[0]))
        for i, block in enumerate(m.blocks):
            name, attention = f"blocks.{i}", block.attn
            normed = point(f"{name}.attn.qkv", block.norm1(x))
            qkv = point(f"{name}.attn.qkv_output", self.linear(f"{name}.attn.qkv", attention.qkv, normed))
            q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            scores = point(f"{name}.attn.scores", q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5)
            attended = point(f"{name}.attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = point(f"{name}.attn_sum", x + point(f"{name}.attn.proj_output", self.linear(f"{name}.attn.proj", attention.proj, attended)))
            hidden = F.gelu(self.linear(f"{name}.mlp.fc1", block.mlp.fc1, point(f"{name}.mlp.fc1", block.norm2(x))))
            fed = self.linear(f"{name}.mlp.fc2", block.mlp.fc2, point(f"{name}.mlp.fc2", hidden))
            x = point(f"{name}.mlp_sum", x + point(f"{name}.mlp.fc2_output", fed))
        return point("head_outputs.0", self.linear("heads.0", m.head, point("heads.0", m.norm(x)[:, 0])))


@pytest.mark.parametrize("bits", [(8, 8), (3, 4)])
def test_the_simulation_is_the_protocol(images, bits, monkeypatch):
    """Point by point: each gets what the naive pass gets there, rounds it alike, and goes on from the naive value, so that no half adds up."""
    naive = Naive(small_vit(depth=2), *bits)
    naive(images)
    quantised = smi.quantize(small_vit(depth=2), images, recipe=PUBLISHED, weight_bits=bits[0], activation_bits=bits[1])
    naive.watching, naive.made = False, quantised.tensors()
    rounds = Codes.simulated
    names = {id(part): name for name, part in quantised.named_modules()}

    def forced(codes, x):
        if codes.in_float:
            return x
        name, before, after = next(trace)
        assert name == names[id(codes)]
        assert distance(x, before) < 1e-6, name
        differs = (rounds(codes, x) - after).abs() / codes.input_scale
        assert differs.max() < 1.001, name
        assert (differs > 0.5).double().mean() < 2e-3, name  # a value on a half: the next code
        return after.float()

    monkeypatch.setattr(Codes, "simulated", forced)
    for some in (images, 3 * images.flip(0)):  # the latter beyond the ranges: clipped
        naive.trace.clear()
        expected, trace = naive(some), iter(naive.trace)
        assert distance(quantised(some), expected) < 1e-6
        assert next(trace, None) is None
    for name, (low, high) in naive.ranges.items():
        assert quantised.inputs()[name][0] == pytest.approx((high - low) / (2 ** bits[1] - 1), rel=1e-5)


@pytest.mark.parametrize("kinds", [("distilled", "layer scale", "query-key norm"), ("CLIP", "registers"), ("no position", "average pool")])
def test_every_family_has_its_points(kinds, images):
    model = small_vit(**{"depth": 1, **{name: value for kind in kinds for name, value in VARIANTS[kind].items()}})
    quantised = smi.quantize(model, images, recipe=PUBLISHED)
    with torch.no_grad():
        assert distance(quantised(images), model(images)) < 0.12
    assert quantised.inputs().keys() == set(quantised.facts.activations())
    assert ("positions" in quantised.inputs()) == ("no position" not in kinds)
    assert ("norm_pre_output" in quantised.inputs()) == ("CLIP" in kinds)
    assert ("head_outputs.1" in quantised.inputs()) == ("distilled" in kinds)


def test_integers_are_the_simulation(model, images, published):
    narrow = smi.quantize(model, images, weight_bits=4, activation_bits=5)
    for quantised, tolerance in ((published, 0.1 if products_saturate() else 0.05), (narrow, 0.01)):  # seven bits for weights; values on a half
        assert distance(quantised.int8()(2 * images), quantised(2 * images)) < tolerance


def test_sparse_images_calibrate_and_dense_ones_are_judged(model, images):
    """The retained patches alone are seen; the range of the position embedding is that of the whole table."""
    sparse = smi.invert(model, method="smi", num_images=6, iterations=4, progress=False)
    quantised = smi.quantize(model, sparse, recipe=PUBLISHED)
    assert quantised(images).shape == quantised(sparse).shape == (6, 5)
    table = model.pos_embed.detach()
    assert quantised.inputs()["positions"][0] == pytest.approx(((table.max() - table.min()) / 255).item(), rel=1e-5)


@pytest.mark.parametrize("ranges", ["percentile", "mse"])
def test_other_ranges_hold_under_it(ranges, images):
    """An outlier stretches min-max; percentile and mean square do not follow it."""
    model, outlier = small_vit(depth=1), images.clone()
    outlier[0, 0, 0, 0] = 60.0
    quantised = smi.quantize(model, outlier, recipe=PUBLISHED, ranges=ranges, activation_bits=4)
    with torch.no_grad():
        low, high = model.patch_embed(outlier).aminmax()
    assert quantised.inputs()["tokens"][0] < 0.9 * (high - low).item() / 15


def test_folders_hold_the_recipe(published, images, tmp_path):
    for quantised in (published, published.int8()):
        folder = quantised.save(tmp_path / quantised.KIND)
        read = load_quantized(folder)
        assert read.facts == quantised.facts
        assert read.facts.recipe.name == PUBLISHED
        assert torch.equal(read(images), quantised(images))
        manifest = json.loads((folder / "quantized.json").read_text())
        del manifest["inputs"]["blocks.1.attn_sum"]
        (folder / "quantized.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="not those of the recipe"):
            load_quantized(folder)


def test_a_folder_without_a_name_is_of_linear_inputs(model, images, tmp_path):
    quantised = smi.quantize(model, images)
    folder = quantised.save(tmp_path / "q")
    manifest = json.loads((folder / "quantized.json").read_text())
    assert manifest["facts"]["recipe"].pop("name") == LINEAR_INPUTS
    (folder / "quantized.json").write_text(json.dumps(manifest))
    assert load_quantized(folder).facts == quantised.facts
    assert torch.equal(load_quantized(folder)(images), quantised(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "best"}, "recipe must be linear-inputs, published or reparametrized, got 'best'"),
        ({"recipe": PUBLISHED, "attention": True}, "leave out attention=True"),
    ],
)
def test_what_is_refused(model, images, settings, message):
    with pytest.raises(InputError, match=message):
        smi.quantize(model, images, **settings)
