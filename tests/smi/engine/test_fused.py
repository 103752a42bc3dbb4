"""The fused engine against the reference: logits, CLS row and pixel gradients, on every kind of model, by both families of layers."""

import pytest
import torch

import smi
from smi import engine
from smi.engine.fused import Fused
from smi.engine.saved_activations import StaticWorkspace
from smi.errors import InputError, RunError
from smi.images.patches import to_patches
from smi.kernels.comparison import relative_error as relative
from smi.kernels.layers import cpp, dispatched
from smi.models.vit import describe
from tests.conftest import small_vit

pytestmark = pytest.mark.fast

AUGMENTATION = torch.tensor([-3, 2, 1], dtype=torch.int32)


@pytest.fixture(params=["packed", "frozen"])
def family(request, monkeypatch):
    """The layers in use: C++, or the dispatcher's with PyTorch's own operations."""
    if request.param == "frozen":
        monkeypatch.setenv("SMI_BACKEND", "stock")
    elif cpp.unsupported(torch.ones(1)):
        pytest.skip("no C++ compiler")
    return {"packed": cpp, "frozen": dispatched}[request.param]


def problem(model, batch=3, active=None, seed=1):
    vit = describe(model)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, vit.channels, *vit.image_size, generator=generator)
    order = torch.rand(batch, vit.num_patches, generator=generator).argsort(1)
    index = order[:, : vit.num_patches if active is None else active].sort(1).values
    pull = torch.randn(batch, vit.num_classes, generator=generator)
    return vit, images, index, pull


def by_reference(vit, images, index, augmentation, pull, dtype=torch.float64):
    pixels = images.to(dtype).requires_grad_()
    output = engine.forward(vit.to("cpu", dtype), pixels, index, augmentation)
    (grad,) = torch.autograd.grad(output.logits, pixels, pull.to(dtype))
    return output, grad


@pytest.mark.parametrize("active", [None, 5, 1])
def test_agrees_with_the_reference_on_every_model(variant, active, family):
    vit, images, index, pull = problem(variant, active=None if active is None else min(active, describe(variant).num_patches))
    truth, grad = by_reference(vit, images, index, AUGMENTATION, pull)
    fused = Fused(vit, "float32")
    assert fused.family is family
    output, _, saved = fused.forward(images, index, AUGMENTATION)
    found = fused.backward(saved, pull)
    assert relative(output.logits, truth.logits) < 1e-5
    assert relative(output.attention, truth.attention) < 1e-5
    assert relative(found, grad) < 1e-5
    assert torch.equal(found == 0, grad == 0)


def test_static_memory_gives_the_same_every_time(variant, family):
    """Twice into the same memory, with another pass without backward between the two."""
    vit, images, index, pull = problem(variant)
    fused, workspace = Fused(vit, "float32"), StaticWorkspace(torch.float32)
    want, _, saved = fused.forward(images, index, AUGMENTATION)
    grad = fused.backward(saved, pull)
    for _ in range(2):
        got, _, saved = fused.forward(images, index, AUGMENTATION, workspace)
        assert torch.equal(fused.backward(saved, pull), grad)
        assert torch.equal(got.logits, want.logits)
        look, _, _ = fused.forward(images, index, AUGMENTATION, workspace, save=False)
        torch.testing.assert_close(look.logits, want.logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(look.attention, want.attention, rtol=1e-5, atol=1e-6)


def test_memory_follows_the_images_the_shape_and_the_engine(variant, family):
    """What was recorded for one shape, batch or engine is never replayed for another."""
    vit, images, index, pull = problem(variant)
    engines, workspace = [Fused(vit, "float32"), Fused(vit, "float32", recompute=True)], StaticWorkspace(torch.float32)
    draws = torch.Generator().manual_seed(5)
    for count, active in ((len(images), index.shape[1]), (1, 2), (len(images), 2), (len(images), index.shape[1])):
        for fused in engines:
            some = torch.randn(images[:count].shape, generator=draws)
            want, _, saved = fused.forward(some, index[:count, :active], AUGMENTATION)
            grad = fused.backward(saved, pull[:count])
            for _ in range(2):
                got, _, saved = fused.forward(some, index[:count, :active], AUGMENTATION, workspace)
                assert torch.equal(got.logits, want.logits)
                assert torch.equal(fused.backward(saved, pull[:count]), grad)


def test_activations_computed_again_give_the_same_gradients(variant, family):
    vit, images, index, pull = problem(variant)
    saving, recomputing, workspace = Fused(vit, "float32"), Fused(vit, "float32", recompute=True), StaticWorkspace(torch.float32)
    want, _, saved = saving.forward(images, index, AUGMENTATION)
    grad = saving.backward(saved, pull)
    for _ in range(2):
        got, _, saved = recomputing.forward(images, index, AUGMENTATION, workspace)
        assert relative(got.logits, want.logits) < 1e-6
        assert relative(recomputing.backward(saved, pull), grad) < 1e-6


@pytest.mark.parametrize("active", [None, 3])
def test_patches_with_their_cells_give_the_logits_of_the_reference(variant, active, family):
    """As a frozen teacher answers sparse images, in whatever order their patches come."""
    vit, images, index, _ = problem(variant, active=active)
    index = index.flip(1).int()
    patches = to_patches(images, vit.patch_size)[torch.arange(len(images))[:, None], index]
    wide = vit.to("cpu", torch.float64)
    truth = engine.forward_patches(wide, patches.double(), index)
    torch.testing.assert_close(truth, engine.forward(wide, images.double(), index).logits, rtol=1e-10, atol=1e-12)
    fused, workspace = Fused(vit, "float32"), StaticWorkspace(torch.float32)
    for _ in range(2):
        assert relative(fused.forward_patches(patches, index, workspace), truth) < 1e-5


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_kept_is_what_is_promised(recompute):
    """3d + 4d + 2d elements per token and block, the 4d unless they are computed again, and a few numbers per row; of the last block 3d, and little
    for its one token."""
    vit, images, index, _ = problem(small_vit(depth=4, embed_dim=48))
    fused = Fused(vit, "float32", recompute)
    if fused.family is dispatched:
        pytest.skip("no C++ compiler")
    _, _, saved = fused.forward(images, index)
    tokens, d, blocks = 3 * 17, 48, 3
    per_row = 4 + 3  # mean and 1 / deviation of two norms, one number per head
    heads, batch = 3, 3
    last = tokens * (3 * d + 2 + heads) + batch * (6 * d + 2)
    assert saved.bytes() == 4 * (tokens * blocks * ((5 if recompute else 9) * d + per_row) + last)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype):
    vit, images, index, pull = problem(small_vit(embed_dim=48, depth=3))
    truth, grad = by_reference(vit, images, index, AUGMENTATION, pull)
    fused = Fused(vit, dtype)
    output, _, saved = fused.forward(images, index, AUGMENTATION)
    found = fused.backward(saved, pull)
    assert found.dtype == torch.float32
    assert (torch.nn.functional.cosine_similarity(found.flatten(1).double(), grad.flatten(1)) > 0.99).all()
    assert relative(output.logits, truth.logits) < 0.05


def test_float64_is_refused():
    with pytest.raises(InputError, match="engine='reference'"):
        Fused(describe(small_vit()), "float64")


QUICK = {"iterations": 8, "progress": False, "num_images": 6, "labels": [0, 1, 2, 3]}


@pytest.mark.parametrize("update", ["active", "all"])
@pytest.mark.parametrize("method", [{"method": "dense"}, {"method": "smi"}, {"method": "pri", "division": 3}])
def test_a_run_is_that_of_the_reference(method, update):
    """Losses of every iteration, retained patches and pixels; the reference in float64, so that what differs is the fused engine's rounding."""
    curves = {}
    made = {}
    for name, dtype in (("fused", "float32"), ("reference", "float64")):
        curve = curves[name] = []
        settings = {"engine": name, "dtype": dtype, "update": update, "on_iteration": lambda at, curve=curve: curve.append(at.loss)}
        made[name] = smi.invert(small_vit(depth=3), **method, **settings, **QUICK)
    assert made["fused"].provenance["engine"] == "fused"
    torch.testing.assert_close(torch.tensor(curves["fused"]), torch.tensor(curves["reference"]), rtol=1e-3, atol=1e-4)
    assert torch.equal(made["fused"].index, made["reference"].index)
    close = (made["fused"].patches - made["reference"].patches).abs() < 1e-3
    assert close.float().mean() > 0.98  # where a gradient is rounding, Adam's first steps take its sign


def test_all_pixels_go_on_moving_only_if_asked():
    noise = torch.randn(2, 3, 16, 16)
    last = {}
    for update in ("active", "all"):
        watch = {"on_iteration": lambda at, update=update: last.__setitem__(update, (at.images.clone(), at.index.clone()))}
        smi.invert(small_vit(), method="smi", update=update, init=noise, **{**QUICK, "num_images": 2}, **watch)
    images, index = last["active"]
    from smi.kernels.image_step.reference import pixel_mask

    left = ~pixel_mask(index, (4, 4), 4).expand_as(images)
    assert left.any()
    assert ((last["all"][0] - images)[left] != 0).any()


@pytest.mark.parametrize("method", [{"method": "smi"}, {"method": "pri", "division": 3}])
@pytest.mark.parametrize("own_losses", [False, True])
def test_a_batch_in_parts_gives_the_same(method, own_losses, monkeypatch):
    """Also with a loss over the whole batch, whose gradient for one image depends on the others."""

    def spread(images, logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels) - 0.1 * logits.std(0).sum() + 1e-3 * images.square().mean()

    from smi.inversion import memory_estimate, prepare

    asked = []
    monkeypatch.setattr(prepare, "chunk_of", lambda *arguments: asked.append(memory_estimate.chunk_of(*arguments)) or 4)
    losses = {"losses": [spread]} if own_losses else {}
    whole = smi.invert(small_vit(depth=3), **method, **losses, **{**QUICK, "num_images": 18})
    parts = smi.invert(small_vit(depth=3), **method, **losses, max_memory=1, **{**QUICK, "num_images": 18})
    assert asked[0] == min(18, len(whole) // (3 if "division" in method else 1))
    assert torch.equal(whole.index, parts.index)
    torch.testing.assert_close(whole.patches, parts.patches, rtol=1e-3, atol=1e-3)


def test_settings_that_do_not_fit_the_engine():
    cases = [
        ({"engine": "quick"}, "it must be fused or reference"),
        ({"engine": "fused", "dtype": "float64"}, "not supported by the fused engine"),
        ({"engine": "reference", "dtype": "bfloat16"}, "not supported by the reference engine"),
        ({"update": "some"}, "update must be active or all"),
        ({"max_memory": -1}, "max_memory must be a positive number"),
        ({"max_memory": 1, "engine": "reference"}, "needs the fused engine"),
        ({"recompute": True, "engine": "reference"}, "recompute needs the fused engine"),
        ({"method": "psaq", "engine": "fused"}, "only engine='reference' keeps"),
    ]
    for settings, message in cases:
        with pytest.raises(InputError, match=message):
            smi.invert(small_vit(), **{"method": "dense", **settings}, **QUICK)


def test_too_little_memory_says_how_much_is_needed():
    with pytest.raises(RunError, match=r"does not hold one trajectory's pass .* allow at least [0-9.e-]+ GiB"):
        smi.invert(small_vit(), method="dense", max_memory=1e-6, **QUICK)


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_estimate_is_near_what_static_memory_takes(recompute):
    from smi.inversion.memory_estimate import step_memory

    model = small_vit(img_size=64, embed_dim=96, depth=6)
    vit, images, index, pull = problem(model, batch=4)
    fused, workspace = Fused(vit, "float32", recompute), StaticWorkspace(torch.float32)
    _, _, saved = fused.forward(images, index, AUGMENTATION, workspace)
    fused.backward(saved, pull)
    taken = sum(tensor.nbytes for tensor in workspace.tensors.values())
    assert 0.75 < taken / step_memory(vit, 4, 256, fused.mode).pass_peak < 1.2


@pytest.mark.parametrize("name", ["digits", pytest.param("deit_tiny_patch16_224", marks=pytest.mark.slow)])
def test_pixel_gradients_of_models_that_users_have(name):
    """The embedded teacher, trained, and DeiT-Tiny's shapes: float32 within 1e-5 of float64, bfloat16 with cosine above 0.99 for every image."""
    from smi.models.by_name import load_model

    vit, images, index, pull = problem(load_model(name, random_weights=name != "digits"), batch=2, active=23)
    _, grad = by_reference(vit, images, index, AUGMENTATION, pull)
    for dtype in ("float32", "bfloat16"):
        fused = Fused(vit, dtype)
        _, _, saved = fused.forward(images, index, AUGMENTATION)
        found = fused.backward(saved, pull)
        cosine = torch.nn.functional.cosine_similarity(found.flatten(1).double(), grad.flatten(1))
        error = relative(found, grad)
        print(f"{name} {dtype}: error {error:.1e}, cosine {cosine.min():.5f}")
        assert (cosine > 0.99).all()
        assert dtype != "float32" or error < 1e-5


@pytest.mark.slow
def test_the_teacher_retains_the_same_patches():
    """200 iterations of SMI in float32, by both engines: at least 95 % of the retained patches are the same."""
    from smi.models.by_name import load_model

    made = [
        smi.invert(load_model("digits"), method="smi", num_images=20, iterations=200, engine=name, dtype="float32", progress=False)
        for name in ("fused", "reference")
    ]
    same = (made[0].index == made[1].index).float().mean()
    assert same > 0.95
