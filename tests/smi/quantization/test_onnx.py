"""ONNX files: onnxruntime gives the simulation's answers, point by point and with its own fused kernels; their form; what is refused.

The same answers: float32 sums in another order can move a value that lies on the half between two codes to the next one, and nothing else differs.
"""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

import smi
from smi.cli import quantize
from smi.cli.main import run
from smi.errors import InputError
from smi.models.folder import save_model
from smi.quantization import onnx_file
from smi.quantization.int8 import products_saturate
from smi.quantization.network import Codes
from smi.quantization.recipe import PUBLISHED, REPARAMETRIZED, Recipe
from smi.quantization.simulate import SimulatedViT
from smi.teachers import digits
from tests.conftest import VARIANTS, fails, small_vit

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

RECIPES = [
    Recipe(),
    Recipe(3, 5, attention=True),
    Recipe(name=PUBLISHED),
    Recipe(4, 4, name=PUBLISHED),
    Recipe(8, 8, name=REPARAMETRIZED),
    Recipe(4, 4, name=REPARAMETRIZED),
]
OTHER_CODES = 2e-3  # fraction of the values of a point that may have the next code, where all before have the simulation's
BEHIND = 0.1  # the same where a value before has moved, and moves others


def answers(file, images, outputs=("logits",)):
    """Outputs of onnxruntime on one thread, with all its fusions."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if products_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = runtime.InferenceSession(file if isinstance(file, bytes) else str(file), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(made) for made in session.run(list(outputs), {"images": images.numpy()})]


def rounded(model, recipe):
    """A simulation whose ranges are chosen, not calibrated: about -4 to 4, each another, so that no sum of two lies between codes; of softmax
    weights from 0 to 1. Made in no time."""
    facts, tensors, *_ = onnx_file._float(model)
    facts, (least, most), codes = replace(facts, recipe=recipe), recipe.weight_codes, 2**recipe.activation_bits - 1
    for name in facts.linears():
        weight = tensors.pop(f"{name}.weight")
        scales = weight.abs().amax(1) / most
        tensors |= {f"{name}.codes": torch.round(weight / scales[:, None]).clamp(least, most).to(torch.int8), f"{name}.scales": scales}
    if recipe.published and "position" in tensors:
        tensors["prefix_position"] = 0.1 * torch.ones_like(tensors["prefix"])
    inputs = {name: ((8 + math.sin(i)) / codes, codes // 2) for i, name in enumerate(facts.activations())}
    inputs |= {name: (1 / codes, 0) for name in inputs if name.endswith("attn.weights")}
    return SimulatedViT(facts, tensors, inputs)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: f"{recipe.name}-{recipe}".replace("/", ""))
def quantised(request):
    return rounded(small_vit(), request.param)


def tolerance(quantised):
    """Of the logits, where a value in the middle has got the next code: a step of four bits is sixteen times one of eight."""
    return 0.02 if quantised.facts.recipe.activation_bits == 8 else 0.2


def points(quantised, images, monkeypatch):
    """What the simulation makes of every rounded activation, by name; and its logits."""
    names, made, rounds = {id(part): name for name, part in quantised.named_modules()}, {}, Codes.simulated

    def watched(codes, x):
        return rounds(codes, x) if codes.in_float else made.setdefault(names[id(codes)], rounds(codes, x))

    with monkeypatch.context() as patch:
        patch.setattr(Codes, "simulated", watched)
        return made, quantised(images)


def test_every_point_gets_the_codes_of_the_simulation(quantised, images, tmp_path, monkeypatch):
    """On images beyond the calibrated ranges too, which are clipped. An output in the middle of the graph keeps it from being fused."""
    model = onnx.load(smi.save_onnx(quantised, tmp_path))
    names = [name for name in quantised.inputs() if name != "positions" and f"{name}.values" not in {each.name for each in model.graph.initializer}]
    for name in names:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(f"{name}.dequantized"))
    for some in (images, 2 * images.flip(0)):
        expected, logits = points(quantised, some, monkeypatch)
        *found, last = answers(model.SerializeToString(), some, [*(f"{name}.dequantized" for name in names), "logits"])
        moved, found = False, dict(zip(names, found, strict=True))
        for name in (name for name in expected if name in found):  # in the order in which they are computed
            made, wanted = found[name], expected[name]
            if name == "embed":  # of the picture here, of its patches there
                made, wanted = made.flatten().sort().values, wanted.flatten().sort().values
            if name.endswith("attn.key"):  # before it is transposed here, behind there
                wanted = wanted.transpose(-2, -1)
            apart = (made.reshape(wanted.shape) - wanted).abs() / quantised.inputs()[name][0]
            others = int((apart > 0.5).sum())
            assert moved or apart.max() < 1.001, name
            assert others <= max(3, (BEHIND if moved else OTHER_CODES) * apart.numel()), name
            moved = moved or others > 0
        assert distance(last, logits) < tolerance(quantised)


def test_fused_it_gives_the_same_answers_for_any_batch(quantised, images, tmp_path):
    file = smi.save_onnx(quantised, tmp_path)
    onnx.checker.check_model(str(file), full_check=True)
    for some in (images, 2 * images[:1]):
        (found,) = answers(file, some)
        assert found.shape == (len(some), 5)
        assert distance(found, quantised(some)) < tolerance(quantised)
    if not quantised.facts.recipe.published:  # whose logits are codes themselves
        with torch.no_grad():
            assert distance(answers(file, images)[0], small_vit()(images)) > 0.005  # no float model


def test_weights_are_int8_and_activations_pass_uint8(quantised, tmp_path):
    """Every code that the model holds is in the file as it is, transposed for the GEMM; every activation of the recipe has its scale."""
    graph = onnx.load(smi.save_onnx(quantised.int8(), tmp_path)).graph
    held = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    for name, tensor in quantised.tensors().items():
        if name.endswith(".codes"):
            assert held[name].dtype == torch.int8
            assert torch.equal(held[name].flatten(1) if name == "embed.codes" else held[name].T, tensor)
    for name, (scale, zero) in quantised.inputs().items():
        if name.endswith("attn.weights") and quantised.facts.recipe.reparametrized:
            values = held[f"{name}.values"]  # a code more, which stands for zero
            assert values[0].item() == pytest.approx(scale * (2**quantised.facts.recipe.activation_bits - 1))
            assert values[-1] == 0
        else:
            assert held[f"{name}.zero"].dtype == torch.uint8
            assert (held[f"{name}.scale"].item(), held[f"{name}.zero"].item()) == (scale, zero)
    largest = max(len(each.raw_data) for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT)
    assert largest < quantised.tensors()["blocks.0.mlp.fc1.codes"].numel()  # no weight matrix in float


@pytest.mark.parametrize("kinds", [("distilled", "layer scale", "query-key norm"), ("CLIP", "registers"), ("no position", "average pool")])
def test_every_family(kinds, images, tmp_path):
    model = small_vit(**{"depth": 1, **{name: value for kind in kinds for name, value in VARIANTS[kind].items()}})
    quantised = rounded(model, Recipe(name=PUBLISHED))
    assert distance(answers(smi.save_onnx(quantised, tmp_path), images)[0], quantised(images)) < 0.02


def test_a_float_model_too(variant, tmp_path):
    """A student is one: the file gives the model's own logits."""
    embed = variant.patch_embed
    some = torch.randn(2, embed.proj.in_channels, *embed.img_size, generator=torch.Generator().manual_seed(2))
    file = smi.save_onnx(variant, tmp_path)
    with torch.no_grad():
        assert distance(answers(file, some)[0], variant(some)) < 1e-5


def test_on_real_images_by_command(tmp_path, capsys, monkeypatch):
    """The digits teacher at W8/A8, calibrated and judged on real digits."""
    made = []
    monkeypatch.setattr(quantize, "save_onnx", lambda model, *given, **more: made.append(model) or smi.save_onnx(model, *given, **more))
    pytest.importorskip("torchao")
    pytest.importorskip("sklearn")
    arguments = ["quantize", "--images", "digits", "-n", "16", "--to", "onnx"]
    fails(capsys, arguments, 2, "pass --output")
    assert run([*arguments, "-o", str(tmp_path / "q"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "onnx"
    fails(capsys, [*arguments, "-o", tmp_path / "q"], 2, "is not empty")
    sizes = smi.datasets.Sizes.of(smi.models.vit.describe(digits()))
    real, labels = smi.datasets.load("digits", sizes, "test", 200)
    (found,), expected = answers(tmp_path / "q" / "model.onnx", real), made[0](real)
    assert distance(found, expected) < 0.03
    assert (found.argmax(1) == expected.argmax(1)).double().mean() >= 0.99
    assert (found.argmax(1) == labels).double().mean() > 0.97


def test_folders_by_command(images, tmp_path, capsys):
    """A student's folder and a quantised model's; the metadata says what it is."""
    model = small_vit()
    save_model(model, tmp_path / "student")
    quantised = rounded(model, Recipe())
    quantised.save(tmp_path / "quantised")
    for name, expected in (("student", model(images).detach()), ("quantised", quantised(images))):
        assert run(["export", str(tmp_path / name), "--to", "onnx", "-o", str(tmp_path / f"{name}.out")]) == 0
        assert "model.onnx" in capsys.readouterr().out
        assert distance(answers(tmp_path / f"{name}.out" / "model.onnx", images)[0], expected) < 0.01
    about = {each.key: each.value for each in onnx.load(tmp_path / "quantised.out" / "model.onnx").metadata_props}
    assert about == {"name": "small_vit", "recipe": "linear-inputs", "widths": "W8/A8"}
    fails(capsys, ["export", tmp_path / "nothing", "--to", "onnx", "-o", tmp_path / "x"], 2, "nothing")


def test_what_is_refused(tmp_path, monkeypatch):
    model = small_vit(depth=1)
    normalising = torch.nn.Sequential(Normalise(), model)
    with pytest.raises(InputError, match="normalises its pixels itself: pass model"):
        smi.save_onnx(normalising, tmp_path / "x")
    (tmp_path / "mine.txt").write_text("hello")
    with pytest.raises(InputError, match="is not empty"):
        smi.save_onnx(model, tmp_path)
    assert smi.save_onnx(model, tmp_path, force=True).name == "model.onnx"
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    with pytest.raises(InputError, match="one ONNX file holds at most 2 GB"):
        smi.save_onnx(model, tmp_path / "x")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"need onnx: pip install 'sparse-model-inversion\[onnx\]'"):
        smi.save_onnx(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


class Normalise(torch.nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25
