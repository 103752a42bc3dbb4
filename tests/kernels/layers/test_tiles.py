"""The GEMM by AMX's tile unit, against the same GEMM by an emulated unit: on processors that multiply bfloat16, with and without AMX."""

import ctypes
import subprocess

import pytest
import torch

from smi.csrc import host
from smi.kernels.cpp_calls import WHOLE_BATCH
from smi.kernels.layers import cpp

NEEDED = host.compiler() is not None and torch.cpu._is_avx512_bf16_supported()
pytestmark = pytest.mark.skipif(not NEEDED, reason="no C++ compiler, or a processor that does not multiply bfloat16")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The library with an emulated tile unit."""
    made = tmp_path_factory.mktemp("tiles") / "emulated.so"
    sources = [str(host.FOLDER / name) for name in ("linear.cpp", "library.cpp")]
    subprocess.run([host.compiler(), *sources, *host.FLAGS, "-march=native", "-DSMI_EMULATE_TILES", "-o", str(made)], check=True)
    library = ctypes.CDLL(str(made))
    host._connect_threads(library)
    assert library.smi_bfloat16_products() == cpp.PRODUCTS.index("tiles of bfloat16s (AMX)")
    return library


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 47, 100, 195])
@pytest.mark.parametrize(("k", "m"), [(32, 32), (96, 40), (320, 130)])
def test_every_row_count(emulated, rows, k, m):
    """Rows that fill no tile, columns that fill no panel, depths of one block and two; each row's result is the same wherever it lies."""
    x, weight, bias = torch.randn(rows, k).bfloat16(), torch.randn(m, k).bfloat16() * k**-0.5, torch.randn(m)
    packed, y = cpp.PackedMatrix(weight.T), torch.full((rows, m), float("nan")).bfloat16()

    def run(x, y):
        params = cpp.Params(x.data_ptr(), packed.memory.data_ptr(), bias.data_ptr(), None, None, None, y.data_ptr(), len(x), k, m, k, 0, 0)
        emulated.smi_linear_bfloat16(ctypes.byref(params), WHOLE_BATCH)
        return y

    found = run(x, y)
    truth = x.double() @ weight.double().T + bias.double()
    assert (found.double() - truth).norm() <= 3e-3 * truth.norm()
    torch.testing.assert_close(found, packed.multiply(x, None, bias=bias), rtol=1e-2, atol=1e-2)
    alone = torch.cat([run(row[None], torch.empty(1, m).bfloat16()) for row in x])
    assert torch.equal(found, alone)
