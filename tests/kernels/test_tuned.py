"""Tiles are chosen by what a device says of itself: its instructions, its multiprocessors, the shared memory of a block."""

from types import SimpleNamespace

import pytest
import torch

from smi.kernels import matmul, tuned, versions
from smi.kernels.attention import tiles

pytestmark = pytest.mark.fast

KIB = 1024
# capability, KiB of a block, code: A100, RTX 3090, L4, H200, B200, Thor, RTX 5090
DEVICES = [((8, 0), 163, 80), ((8, 6), 99, 80), ((8, 9), 99, 80), ((9, 0), 227, 90), ((10, 0), 227, 100), ((11, 0), 227, 100), ((12, 0), 99, 80)]


@pytest.fixture
def gpu(monkeypatch):
    """cuda:0 as torch describes it, with a capability and KiB of shared memory for a block."""

    def plug_in(capability, kib):
        tuned.limits.cache_clear()
        tuned.table.cache_clear()
        properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=128, shared_memory_per_block_optin=kib * KIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Imaginary")
        return torch.device("cuda", 0)

    yield plug_in
    tuned.limits.cache_clear()
    tuned.table.cache_clear()


@pytest.mark.parametrize(("capability", "kib", "code"), DEVICES)
def test_what_limits_a_device(gpu, capability, kib, code):
    assert tuned.limits(gpu(capability, kib)) == (code, 128, kib * KIB)


@pytest.mark.parametrize(("capability", "kib", "code"), DEVICES)
@pytest.mark.parametrize("width", tiles.WIDTHS)
def test_attention_takes_what_fits(gpu, capability, kib, code, width):
    """197 tokens on sm_120 took the tile of sm_90, of 106,624 bytes, and raised OutOfResources."""
    x = SimpleNamespace(dtype=torch.bfloat16, itemsize=2, device=gpu(capability, kib))
    for n in range(1, 300):
        tile = tiles.backward(n, width, x)
        if tile is not None:
            (entry,) = {entry for entry in tiles.BACKWARD[width, 2] if entry.tile == tile and entry.n >= n and entry.oldest <= code}
            assert entry.shared <= kib
    if kib == 99:
        assert tiles.backward(197, 64, x) is None  # the pair
    assert tiles.queries(width, x).stages == (1 if kib == 99 and width == 128 else 2)
    if code == 90:
        assert tiles.backward(197, 64, x) == tiles.Tile(32, 256, 256, 8, 2)
        assert tiles.backward(128, 128, x) == tiles.Tile(32, 128, 128, 8, 1)


def test_less_memory_on_the_same_instructions_is_another_tile(gpu):
    """By the memory, and not by the number of the architecture."""
    entries = tiles.BACKWARD[64, 2]
    assert tiles.first(entries, 197, 90, 227).tile == tiles.Tile(32, 256, 256, 8, 2)
    assert tiles.first(entries, 197, 90, 163) is None


@pytest.mark.parametrize(("capability", "kib", "code"), DEVICES)
@pytest.mark.parametrize("rows", [64, 2048, 25216])
def test_gemms_take_what_fits(gpu, capability, kib, code, rows):
    device = gpu(capability, kib)
    for operation in ("linear_gelu", "linear_residual"):
        kernel = versions.load(operation, "triton")
        for table, left in ((kernel.TILES, 1), (kernel.BACKWARD_TILES, 2 if operation == "linear_gelu" else 1)):
            tile = matmul.choose(table, rows, 3072, 768, device, torch.bfloat16, left)
            assert tile in table[code, 2]
            assert matmul.shared_bytes(tile, 2, left) <= kib * KIB


def test_a_gemm_tile_that_does_not_fit_is_left_out(gpu):
    large, small = matmul.TILES[90, 2][0], matmul.TILES[90, 2][-1]
    assert matmul.choose(matmul.TILES, 25216, 3072, 768, gpu((9, 0), 227), torch.bfloat16) == large
    assert matmul.choose(matmul.TILES, 25216, 3072, 768, gpu((9, 0), 96), torch.bfloat16) == large
    assert matmul.choose(matmul.TILES, 25216, 3072, 768, gpu((9, 0), 95), torch.bfloat16) == small
