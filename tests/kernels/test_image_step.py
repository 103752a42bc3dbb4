import math

import pytest
import torch
from torch.library import opcheck

from smi.kernels import versions
from smi.kernels.image_step import image_step, tv_norms
from smi.kernels.image_step.reference import image_step as definition
from smi.kernels.image_step.reference import pixel_mask, tv_gradient
from smi.kernels.image_step.reference import tv_norms as norms_definition
from tests.kernels import checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VERSIONS = checks.VERSIONS
FAST = [version for version in VERSIONS if version in ("triton", "cpu")]
WRITTEN = ("images", "exp_avg", "exp_avg_sq")


def arguments(patch=4, grid=(5, 3), n=7, channels=3, batch=2, tv=True, step=3, device="cpu"):
    shape = (batch, channels, grid[0] * patch, grid[1] * patch)
    images, grad, exp_avg = torch.randn(3, *shape, dtype=torch.float64, device=device).unbind()
    bound = torch.linspace(1, 1.5, channels, dtype=torch.float64, device=device)
    index = None if n is None else torch.rand(batch, grid[0] * grid[1], device=device).argsort(1)[:, :n].to(torch.int32)
    return {
        "images": images,
        "grad": grad,
        "exp_avg": exp_avg,
        "exp_avg_sq": torch.rand(shape, dtype=torch.float64, device=device) + 0.1,
        "step": torch.tensor(step, device=device),
        "low": -bound,
        "high": bound + 0.25,
        "index": index,
        "patch_size": patch,
        "norms": norms_definition(images) if tv else None,
        "tv_weight": 20.0 if tv else 0.0,  # so that its gradient is as large as grad
    }


def test_norms_as_worked_by_hand():
    images = torch.tensor([[[[0.0, 3.0], [4.0, 12.0]]], [[[1.0, 1.0], [1.0, 1.0]]]], dtype=torch.float64)
    squares = [3**2 + 8**2, 4**2 + 9**2, 12**2, (4 - 3) ** 2]
    for version in VERSIONS:
        with versions.forced(version):
            norms = tv_norms(images if version == "reference" else images.float())
        torch.testing.assert_close(norms.double(), torch.tensor(squares, dtype=torch.float64).sqrt(), rtol=1e-7, atol=0)


def test_gradient_is_that_of_the_norms():
    images = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    norms = norms_definition(images)
    (grad,) = torch.autograd.grad(norms.sum(), images)
    torch.testing.assert_close(tv_gradient(images.detach(), norms.detach()), grad)
    weights = torch.randn(4, dtype=torch.float64)
    (grad,) = torch.autograd.grad(norms_definition(images), images, weights)
    torch.testing.assert_close(tv_gradient(images.detach(), norms.detach(), weights), grad)


def test_gradcheck():
    images = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norms_definition, (images,))
    with versions.forced("reference"), torch.autograd.set_multithreading_enabled(False):
        assert torch.autograd.gradcheck(tv_norms, (images,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", [(2, 3, 20, 12), (1, 1, 1, 1), (1, 2, 1, 9), (3, 1, 7, 1), (2, 3, 33, 65), (0, 3, 8, 8)])
def test_norms_and_their_gradient_meet_the_error_rule(version, shape, dtype, device):
    checks.needs(version, dtype, torch.float32)
    images = torch.randn(shape, dtype=torch.float64, device=device)
    narrow, exact = images.to(dtype), images.to(dtype).double()
    weights = torch.randn(4, dtype=torch.float64, device=device)

    def run(function, x, version="reference"):
        x = x.clone().requires_grad_()
        with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
            norms = function(x)
            return norms.detach(), torch.autograd.grad(norms, x, weights.to(norms.dtype))[0]

    truth, plain, out = run(norms_definition, exact), run(norms_definition, narrow), run(tv_norms, narrow, version)
    assert [out[0].dtype, out[1].dtype] == [torch.float32, dtype]
    torch.testing.assert_close(out[0].double(), truth[0], rtol=1e-6, atol=0)  # four numbers: the rule would ask for lucky roundings
    checks.assert_close_enough(f"{version} gradient {dtype} {shape}", out[1], plain[1], truth[1])


def test_norms_with_more_tiles_than_programs(device, monkeypatch):
    """Each program sums several tiles; the same again bit for bit."""
    from smi.kernels.image_step import kernel

    monkeypatch.setattr(kernel, "PROGRAMS", 7)
    images = torch.randn(2, 3, 96, 80, device=device)
    with versions.forced("triton"):
        norms, again = tv_norms(images), tv_norms(images)
    assert torch.equal(norms, again)
    torch.testing.assert_close(norms.double(), norms_definition(images.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_norms_of_zero_give_no_gradient(version, device):
    images = torch.full((2, 3, 8, 8), 0.5, device=device, requires_grad=True)
    with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
        norms = tv_norms(images)
        (grad,) = torch.autograd.grad(norms.sum(), images)
    assert torch.equal(norms, torch.zeros_like(norms))
    assert torch.equal(grad, torch.zeros_like(grad))
    given = checks.cast(arguments(patch=4, grid=(2, 2), n=2, device=device), torch.float32) | {"images": images.detach(), "norms": norms.detach()}
    plain = given | {"images": images.detach().clone(), "norms": None, "tv_weight": 0.0}
    plain |= {name: plain[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    with versions.forced(version):
        image_step(**given)
        image_step(**plain)
    assert all(torch.equal(given[name], plain[name]) for name in WRITTEN)


@pytest.mark.parametrize("tv", [False, True])
def test_definition_is_adam(tv):
    """Against torch.optim.Adam over several steps, in float64, with the gradient of the total variation by autograd."""
    given = arguments(n=None, tv=False) | {"low": torch.full((3,), -1e9), "high": torch.full((3,), 1e9)}
    given |= {"exp_avg": torch.zeros_like(given["images"]), "exp_avg_sq": torch.zeros_like(given["images"])}
    images = given["images"].clone().requires_grad_()
    adam = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.99), eps=1e-8)
    for step in range(1, 8):
        given["grad"] = torch.randn_like(images)
        images.grad = given["grad"].clone()
        if tv:
            images.grad += 20 * torch.autograd.grad(norms_definition(images).sum(), images)[0]
            given |= {"norms": norms_definition(given["images"]), "tv_weight": 20.0}
        adam.step()
        definition(**given | {"step": torch.tensor(step)})
        torch.testing.assert_close(given["images"], images.detach())
    torch.testing.assert_close(given["exp_avg"], adam.state[images]["exp_avg"])
    torch.testing.assert_close(given["exp_avg_sq"], adam.state[images]["exp_avg_sq"])


def test_definition_clips():
    given = arguments(n=None) | {"lr": 1e9}
    definition(**given)
    low, high = given["low"].view(-1, 1, 1), given["high"].view(-1, 1, 1)
    assert ((given["images"] == low) | (given["images"] == high)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("n", [7, None])
@pytest.mark.parametrize("tv", [False, True])
def test_versions_meet_the_error_rule(version, n, tv, dtype, device):
    checks.needs(version, dtype, torch.float32)
    checks.check_version(version, image_step, definition, arguments(n=n, tv=tv, device=device), (), dtype, WRITTEN)


SIZES = [
    (4, (7, 8), 46, 1),
    (4, (5, 6), 29, 3),
    (8, (4, 7), 28, 4),
    (14, (3, 5), 7, 3),
    (16, (2, 4), 7, 1),
    (16, (3, 4), 7, 3),
    (32, (1, 3), 1, 3),
    (40, (2, 2), 3, 2),
]


@pytest.mark.parametrize("version", FAST)
@pytest.mark.parametrize(("patch", "grid", "n", "channels"), SIZES)
def test_sizes(version, patch, grid, n, channels, device):
    for given in (arguments(patch, grid, n, channels, device=device), arguments(patch, grid, None, channels, batch=1, device=device)):
        checks.check_version(version, image_step, definition, given, (), torch.float32, WRITTEN)


@pytest.mark.parametrize("version", FAST)
@pytest.mark.parametrize("step", [1, 2, 13, 70, 4000])
@pytest.mark.parametrize("betas", [(0.5, 0.99), (0.9, 0.999), (0.0, 0.9)])
def test_bias_correction(version, step, betas, device):
    """Early steps, where 1 - beta**step would cancel; images of zeros, so that nothing hides the size of the step."""
    given = arguments(tv=False, step=step, device=device) | {"betas": betas, "lr": 0.1}
    given["images"].zero_()
    checks.check_version(version, image_step, definition, given, (), torch.float32, WRITTEN)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tv", [False, True])
@pytest.mark.parametrize("to_out", [False, True])
def test_frozen_pixels_and_moments_do_not_change(version, tv, to_out, device):
    given = checks.cast(arguments(tv=tv, device=device), torch.float32)
    before = {name: given[name].clone() for name in WRITTEN}
    out = torch.full_like(given["images"], math.nan) if to_out else None
    with versions.forced(version):
        image_step(**given, out=out)
    frozen = ~pixel_mask(given["index"], (5, 3), 4).expand_as(given["images"])
    assert 0 < frozen.sum() < frozen.numel()
    for name in WRITTEN if out is None else ("exp_avg", "exp_avg_sq"):
        assert torch.equal(given[name][frozen], before[name][frozen])
        assert not torch.equal(given[name], before[name])
    if to_out:
        assert torch.equal(given["images"], before["images"])
        assert torch.equal(out.isnan(), frozen)


@pytest.mark.parametrize("n", [7, None])
def test_in_place_equals_out_of_place(n, device):
    """Neighbours are read as they were before the step, though programs move them one after the other."""
    given = checks.cast(arguments(n=n, device=device), torch.float32)
    copies = {name: given[name].clone() for name in WRITTEN}
    out = given["images"].clone()
    with versions.forced("triton"):
        image_step(**given | {name: copies[name].clone() for name in ("exp_avg", "exp_avg_sq")}, out=out)
        image_step(**given | copies)
    assert torch.equal(out, copies["images"])


@pytest.mark.parametrize("version", VERSIONS)
def test_all_patches_are_all_pixels(version, device):
    given = checks.cast(arguments(n=15, device=device), torch.float32)
    without = given | {name: given[name].clone() for name in WRITTEN} | {"index": None}
    with versions.forced(version):
        image_step(**given)
        image_step(**without)
    assert all(torch.equal(given[name], without[name]) for name in WRITTEN)


@pytest.mark.parametrize("version", VERSIONS)
def test_nan_gradient_stays_visible(version, device):
    given = checks.cast(arguments(n=None, tv=False, device=device), torch.float32)
    given["grad"][1, 2, 3, 4] = math.nan
    with versions.forced(version):
        image_step(**given)
    assert given["images"].isnan().nonzero().tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("version", VERSIONS)
def test_non_contiguous_and_integer_types(version, integer, device):
    given = arguments(grid=(4, 4), device=device)
    given["grad"] = given["grad"].transpose(2, 3)
    given["index"] = given["index"].T.contiguous().T.to(integer)
    given["step"] = given["step"].to(integer)
    assert not any(given[name].is_contiguous() for name in ("grad", "index"))
    checks.check_version(version, image_step, definition, given, (), torch.float32, WRITTEN)


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_active(version, device):
    for given in (arguments(n=0, device=device), arguments(batch=0, device=device)):
        given = checks.cast(given, torch.float32)
        before = given["images"].clone()
        with versions.forced(version):
            image_step(**given)
        assert torch.equal(given["images"], before)


@pytest.mark.parametrize("options", [True, False])
def test_opcheck(options):
    given = checks.cast(arguments(n=7 if options else None, tv=options), torch.float32)
    out = torch.zeros_like(given["images"]) if options else None
    opcheck(torch.ops.smi.image_step.default, (*given.values(), 0.25, 0.5, 0.99, 1e-8, out))
    opcheck(torch.ops.smi.image_step_tv_norms.default, (given["images"].requires_grad_(),))
    opcheck(torch.ops.smi.image_step_tv_norms_backward.default, (given["images"].detach(), torch.rand(4), torch.rand(4)))


def test_compiles_without_a_break():
    given = checks.cast(arguments(), torch.float32)
    compiled = torch.compile(lambda **kw: image_step(**kw | {"norms": tv_norms(kw["images"])}), fullgraph=True, backend="aot_eager")
    copies = {name: given[name].clone() for name in WRITTEN}
    compiled(**given | copies)
    image_step(**given)
    for name in WRITTEN:
        assert torch.equal(copies[name], given[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.ones(2, 3, 20)}, "images must be floating point"),
        ({"images": torch.ones(2, 3, 12, 20).transpose(2, 3)}, "images must be contiguous"),
        ({"exp_avg": torch.ones(2, 3, 20, 11)}, "exp_avg must be floating point"),
        ({"exp_avg_sq": torch.ones(2, 3, 12, 20).transpose(2, 3)}, "exp_avg_sq must be contiguous"),
        ({"images": torch.ones(2, 3, 20, 12, requires_grad=True)}, "images is written in place: detach it"),
        ({"grad": torch.ones(1)}, "grad must be floating point"),
        ({"step": 3 * torch.ones(())}, "step must be an int32 or int64 scalar"),
        ({"step": torch.ones(1, dtype=torch.int32)}, "step must be an int32 or int64 scalar"),
        ({"low": torch.ones(1)}, r"low and high must be \[3\]"),
        ({"index": torch.zeros(3, 7, dtype=torch.int32)}, r"index must be int32 or int64 \[2, n\]"),
        ({"patch_size": 8}, "do not divide into patches of 8"),
        ({"norms": None}, r"total variation needs norms \[4\]"),
        ({"betas": (0.5, 1.0)}, r"betas must lie in \[0, 1\)"),
        ({"out": torch.ones(2, 3, 20, 12, dtype=torch.bfloat16)}, "out must be torch.float32"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        image_step(**checks.cast(arguments(), torch.float32) | change)


def test_more_programs_than_a_grid_holds_are_refused():
    """Shapes alone decide, so tensors of one element stand in for the memory."""
    one = torch.zeros(1)
    kernel = versions.load("image_step", "triton")
    for channels, side, patches, fits in ((3, 4096, 16384, True), (3, 8192, 65536, False), (2**12, 512, None, False)):
        images = one.expand(1, channels, side, side)
        index = None if patches is None else torch.zeros(1, 1, dtype=torch.int32).expand(1, patches)
        why = kernel.unsupported("forward", images, images, images, images, one, one, one, index, 32)
        assert why is None if fits else "second dimension" in why
    assert "second dimension" in kernel.unsupported("tv_norms_backward", one.expand(1, 2**12, 512, 512), one, one)


def test_out_may_not_be_images():
    given = checks.cast(arguments(), torch.float32)
    with pytest.raises(ValueError, match="out must not be images"):
        image_step(**given, out=given["images"])
    with pytest.raises(ValueError, match="images must be floating point"):
        tv_norms(torch.ones(3, 4, 4))
