import math

import pytest
import torch
from torch.library import opcheck

from smi.kernels import versions
from smi.kernels.patch_embed import patch_embed
from smi.kernels.patch_embed.reference import moved_cells, source_pixels
from smi.kernels.patch_embed.reference import patch_embed as definition
from tests.kernels import checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments(patch=4, grid=(5, 3), n=7, channels=3, d=24, prefix=1, batch=2, augmentation=(-5, 6, 1), device="cpu"):
    cells = grid[0] * grid[1]

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=device)

    return {
        "images": random(batch, channels, grid[0] * patch, grid[1] * patch),
        "index": torch.rand(batch, cells, device=device).argsort(1)[:, :n].to(torch.int32),
        "weight": random(d, channels * patch**2) / patch,
        "bias": random(d),
        "position": random(cells, d),
        "prefix": random(prefix, d),
        "augmentation": torch.tensor(augmentation, device=device),
        "patch_size": patch,
    }


def by_convolution(images, index, weight, bias, position, prefix, augmentation, patch_size):
    """Roll, flip, convolve the whole image, then pick each active patch's token at the cell whose corner is nearest to where the patch went."""
    dy, dx, flip = augmentation.tolist()
    _, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    moved = torch.roll(images, (dy, dx), (2, 3))
    moved = moved.flip(3) if flip else moved
    kernel = weight.view(-1, channels, patch_size, patch_size)
    tokens = torch.nn.functional.conv2d(moved, kernel, bias, stride=patch_size).flatten(2).transpose(1, 2) + position
    picked = []
    for image, cells in zip(tokens, index.tolist(), strict=True):
        for cell in cells:
            row = (cell // columns + math.floor(dy / patch_size + 0.5)) % rows
            column = (cell % columns + math.floor(dx / patch_size + 0.5)) % columns
            picked.append(image[row * columns + (columns - 1 - column if flip else column)])
    picked = torch.stack(picked).view(*index.shape, -1)
    return torch.cat([prefix.expand(len(images), -1, -1), picked], 1)


@pytest.mark.parametrize(
    ("cell", "augmentation", "moved"),
    [
        (0, (0, 0, 0), 0),
        (4, (0, 0, 0), 4),
        (0, (2, 0, 0), 3),  # half a patch down rounds up, to one
        (0, (-2, 0, 0), 0),  # half a patch up rounds up, to none
        (0, (1, 1, 0), 0),
        (0, (-3, 0, 0), 3),  # one row up wraps to the last of two
        (0, (0, -3, 0), 2),
        (5, (0, 2, 0), 3),  # past the right edge
        (0, (0, 0, 1), 2),
        (4, (0, 0, 1), 4),  # the middle column stays
        (0, (0, 2, 1), 1),  # right by one to column 1, its own mirror image
        (1, (4, 4, 1), 3),  # down to row 1, right to column 2, mirrored to 0
        (1, (400, -1200, 0), 1),  # whole turns
    ],
)
def test_cells_move_as_worked_by_hand(cell, augmentation, moved):
    """A grid of 2 rows and 3 columns of patches of 4."""
    assert moved_cells(torch.tensor([[cell]]), (2, 3), 4, torch.tensor(augmentation)).item() == moved


def test_pixels_under_a_cell_as_worked_by_hand():
    """Patches of 2 in an image 2 high and 4 wide; rolled right by 1 the image's columns stand in the order 3 0 1 2, mirrored 2 1 0 3."""
    cells, one_right = torch.tensor([[0, 1]]), torch.tensor([0, 1, 0])
    assert source_pixels(cells, (1, 2), 2, one_right).tolist() == [[[[3, 0], [7, 4]], [[1, 2], [5, 6]]]]
    mirrored = torch.tensor([0, 1, 1])
    assert source_pixels(cells, (1, 2), 2, mirrored).tolist() == [[[[2, 1], [6, 5]], [[0, 3], [4, 7]]]]


@pytest.mark.parametrize("flip", [0, 1])
def test_every_pixel_is_read_exactly_once(flip):
    grid, patch = (2, 3), 4
    everything = torch.arange(6)[None]
    for dy in range(-9, 10, 3):
        for dx in range(-13, 14, 2):
            augmentation = torch.tensor([dy, dx, flip])
            cells = moved_cells(everything, grid, patch, augmentation)
            assert cells.sort().values.tolist() == everything.tolist()
            assert source_pixels(cells, grid, patch, augmentation).flatten().sort().values.tolist() == list(range(8 * 12))


AUGMENTATIONS = [(0, 0, 0), (2, -2, 0), (-2, 2, 1), (7, 1, 1), (-9, -3, 0), (6, 5, 1)]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (5, 1)])
def test_definition_is_roll_flip_convolve_pick(augmentation, grid):
    given = arguments(grid=grid, n=min(7, grid[0] * grid[1]), augmentation=augmentation)
    torch.testing.assert_close(definition(**given), by_convolution(**given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", checks.VERSIONS)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_versions_meet_the_error_rule(version, augmentation, dtype, device):
    checks.needs(version, dtype, torch.float32)
    checks.check_version(version, patch_embed, definition, arguments(augmentation=augmentation, device=device), ("images",), dtype)


SIZES = [
    # patch, grid, n, channels, d, prefix
    (4, (7, 8), 46, 1, 33, 1),
    (4, (6, 5), 29, 3, 130, 0),
    (8, (4, 7), 28, 4, 40, 2),
    (14, (7, 7), 46, 3, 24, 1),
    (14, (2, 3), 1, 1, 16, 5),
    (16, (3, 10), 28, 3, 72, 1),
    (16, (2, 4), 7, 1, 16, 1),
    (32, (1, 3), 1, 3, 20, 2),
    (32, (2, 4), 7, 1, 8, 0),
]


@pytest.mark.parametrize(("patch", "grid", "n", "channels", "d", "prefix"), SIZES)
def test_sizes(patch, grid, n, channels, d, prefix, device):
    augmentation = (-(patch // 2), patch + patch // 2, 1)
    given = arguments(patch, grid, n, channels, d, prefix, augmentation=augmentation, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        checks.check_version("triton", patch_embed, definition, given, ("images",), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tile(dtype, device, monkeypatch):
    """More tokens, dimensions and pixels than one tile has, in the tile of large work too."""
    from smi.kernels.patch_embed import kernel

    given = arguments(patch=8, grid=(8, 9), n=69, d=140, batch=2, device=device)
    for threshold in (0, 2**40):
        monkeypatch.setattr(kernel, "LARGE_FROM", threshold)
        checks.check_version("triton", patch_embed, definition, given, ("images",), dtype)


@pytest.mark.parametrize("version", checks.VERSIONS)
@pytest.mark.parametrize("n", [6, 15])
def test_pixels_that_no_active_patch_reads_get_zero(version, n, device):
    given = checks.cast(arguments(n=n, device=device), torch.float32)
    images = given["images"].requires_grad_()
    with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
        (grad,) = torch.autograd.grad(patch_embed(**given).sum(), images)
    cells = moved_cells(given["index"], (5, 3), 4, given["augmentation"])
    read = torch.zeros(2, 20 * 12, dtype=torch.bool, device=device)
    read.scatter_(1, source_pixels(cells, (5, 3), 4, given["augmentation"]).flatten(1).long(), True)
    assert read.sum() == 2 * n * 16
    assert torch.equal(grad != 0, read.view(2, 1, 20, 12).expand(-1, 3, -1, -1))


@pytest.mark.parametrize("version", checks.VERSIONS)
def test_without_options(version, device):
    given = arguments(device=device) | {"bias": None, "position": None, "prefix": None, "augmentation": None}
    checks.check_version(version, patch_embed, definition, given, ("images",), torch.float32)
    given = arguments(augmentation=(0, 0, 0), device=device)
    for dtype in (torch.int32, torch.int64):
        still = given | {"augmentation": None, "index": given["index"].to(dtype)}
        checks.check_version(version, patch_embed, definition, still, ("images",), torch.float32)
        assert torch.equal(definition(**still), definition(**given))


@pytest.mark.parametrize("version", checks.VERSIONS)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_non_contiguous_and_integer_types(version, integer, device):
    given = arguments(grid=(4, 4), device=device)
    given["images"] = given["images"].transpose(2, 3)
    given["index"] = given["index"].T.contiguous().T.to(integer)
    given["weight"] = given["weight"].T.contiguous().T
    given["augmentation"] = torch.tensor([[2, 9], [-3, 9], [1, 9]], dtype=integer, device=device)[:, 0]
    assert not any(given[name].is_contiguous() for name in ("images", "index", "weight", "augmentation"))
    checks.check_version(version, patch_embed, definition, given, ("images",), torch.float32)


@pytest.mark.parametrize("version", checks.VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_pixels_under_16_bit_weights(version, dtype, device):
    """Tokens in the weights' dtype, the gradient in the pixels'."""
    checks.needs(version, dtype, torch.float32, torch.bfloat16)
    given = arguments(device=device)
    narrow = checks.cast(given, dtype) | {"images": given["images"].float()}
    exact = checks.cast(narrow, torch.float64)
    weights = (torch.randn(2, 8, 24, device=device).to(dtype).double(),)
    truth = checks.run(definition, exact, ("images",), weights)
    plain = checks.run(by_convolution, checks.cast(narrow, dtype), ("images",), weights)
    with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
        out = checks.run(patch_embed, narrow, ("images",), weights)
    assert (out["out0"].dtype, out["d_images"].dtype) == (dtype, torch.float32)
    for name in truth:
        checks.assert_close_enough(f"{version} {name}", out[name].to(dtype), plain[name], truth[name])


def test_images_may_change_before_backward(device):
    """The loop updates pixels in place; backward needs none of them."""
    given = checks.cast(arguments(device=device), torch.float32)
    images = given["images"].clone().requires_grad_()
    tokens = patch_embed(**given | {"images": images})
    with torch.no_grad():
        images.fill_(float("nan"))
    tokens.sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("version", checks.VERSIONS)
def test_empty(version, device):
    for batch, n in ((0, 7), (2, 0)):
        given = checks.cast(arguments(batch=batch, n=n, device=device), torch.float32)
        images = given["images"].requires_grad_()
        with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
            tokens = patch_embed(**given)
            (grad,) = torch.autograd.grad(tokens.sum(), images)
        assert torch.equal(tokens, given["prefix"].expand(batch, -1, -1)) if n == 0 else tokens.shape == (0, 8, 24)
        assert torch.equal(grad, torch.zeros_like(images))


def test_too_large_for_32_bit_offsets_is_refused():
    """Shapes alone decide, so tensors of one element stand in for the memory."""
    wide = torch.zeros(1).expand(1, 1, 2**16, 2**15)
    given = {"images": wide, "index": torch.zeros(1, 1, dtype=torch.int64), "weight": torch.zeros(1, 1), "patch_size": 1}
    with versions.forced("triton"), pytest.raises(versions.BackendUnavailable, match="2\\^31"):
        patch_embed(**given)


def test_gradcheck():
    given = arguments(patch=2, grid=(2, 3), n=4, d=3, augmentation=(1, -3, 1))
    images = given.pop("images").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: definition(x, **given), (images,))
    for version in ("reference", "stock"):
        with versions.forced(version), torch.autograd.set_multithreading_enabled(False):
            assert torch.autograd.gradcheck(lambda x: patch_embed(x, **given), (images,))


@pytest.mark.parametrize("options", [True, False])
def test_opcheck(options):
    given = checks.cast(arguments(), torch.float32)
    if not options:
        given |= {"bias": None, "position": None, "prefix": None, "augmentation": None}
    given["images"].requires_grad_()
    opcheck(torch.ops.smi.patch_embed.default, tuple(given.values()))
    grad = torch.randn(2, 8, 24)
    opcheck(torch.ops.smi.patch_embed_backward.default, (grad, given["index"], given["weight"], given["augmentation"], 4, 1, 20, 12, torch.float32))


def test_compiles_without_a_break():
    given = checks.cast(arguments(), torch.float32)
    compiled = torch.compile(patch_embed, fullgraph=True, backend="aot_eager")
    weights = (torch.randn(2, 8, 24),)
    got, want = (checks.run(function, given, ("images",), weights) for function in (compiled, patch_embed))
    for name, value in want.items():
        assert torch.equal(got[name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.ones(2, 3, 20, 13)}, "do not divide into patches of 4"),
        ({"images": torch.ones(2, 3, 240)}, "images must be floating point"),
        ({"images": torch.ones(2, 3, 20, 12, dtype=torch.int32)}, "images must be floating point"),
        ({"images": torch.ones(2, 3, 20, 12, dtype=torch.float64)}, "images must be torch.float32, like weight"),
        ({"weight": torch.ones(24, 16)}, r"weight must be \[d, 48\]"),
        ({"weight": torch.ones(24, 48, requires_grad=True)}, "no gradient for weight"),
        ({"index": torch.zeros(3, 7, dtype=torch.int32)}, r"index must be int32 or int64 \[2, n\]"),
        ({"index": torch.zeros(2, 7)}, "index must be int32 or int64"),
        ({"bias": torch.ones(3)}, r"bias must be \[24\]"),
        ({"position": torch.ones(14, 24)}, r"position must be \[15, 24\]"),
        ({"prefix": torch.ones(24)}, r"prefix must be \['P', 24\]"),
        ({"prefix": torch.ones(1, 24, dtype=torch.bfloat16)}, "prefix must be torch.float32"),
        ({"augmentation": torch.zeros(3)}, "augmentation must be int32 or int64"),
        ({"augmentation": torch.zeros(2, dtype=torch.int32)}, "augmentation must be int32 or int64"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        patch_embed(**checks.cast(arguments(), torch.float32) | change)
