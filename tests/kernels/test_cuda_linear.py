"""The linear layers in CUDA C++ without a GPU: the arithmetic of their epilogues, and what CUTLASS's host code would launch for which memory."""

import ctypes
import shutil
import subprocess
import types

import pytest
import torch
from torch import Tensor

from smi.csrc import build
from smi.kernels import cuda_calls, dispatch, versions
from smi.kernels.comparison import cast, error_of
from smi.kernels.linear_gelu import cuda as gelu_cuda
from smi.kernels.linear_gelu.reference import linear_gelu as gelu_definition
from smi.kernels.linear_residual import cuda as residual_cuda
from smi.kernels.linear_residual.reference import linear_residual as residual_definition
from smi.kernels.precision import same_precision
from tests.kernels import checks, emulated_linear
from tests.kernels.emulated_linear import MULTIPROCESSORS, SWIZZLE_BYTES, TWO_BYTES, EmulatedLinear

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")
needs_cutlass = pytest.mark.skipif(
    build.nvcc() is None or build.cutlass() is None, reason=f"nvcc and CUTLASS's headers are needed: pip install --no-deps {build.CUTLASS}"
)
needs_device = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != cuda_calls.LINEAR_DEVICE, reason="no CUDA device of compute capability 9.0"
)
SHARED_LIMIT = 232448  # bytes of a block at compute capability 9.0
# DeiT-Tiny, -Small and -Base, ViT-Large; 128 images of 197 and 47 tokens, PRI's rows of 18 images, the fewest, and rests of tiles
WIDTHS = (192, 384, 768, 1024)
ROWS = (25216, 6016, 3546, 522, 128, 65, 64)
LAYERS = [(kind, c * w, d * w) for w in WIDTHS for kind, c, d in (("gelu", 4, 1), ("residual", 1, 4), ("residual", 1, 1), ("gelu_gradient", 4, 1))]


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """The functions of linear_epilogue.h on float32 tensors."""
    folder = tmp_path_factory.mktemp("epilogue")
    names = ("gelu", "gelu_slope", "saved_of", "times_slope")
    calls = [f"{name}(x[i]{', y[i]' if name == 'times_slope' else ''})" for name in names]
    body = "".join(
        f'extern "C" void smi_{n}(const float* x, const float* y, float* out, long n) {{ for (long i = 0; i < n; ++i) out[i] = smi::{c}; }}\n'
        for n, c in zip(names, calls, strict=True)
    )
    (folder / "functions.cpp").write_text('#include "linear_epilogue.h"\n' + body)
    library = folder / "functions.so"
    subprocess.run(["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-I", build.FOLDER, "-o", library, folder / "functions.cpp"], check=True)
    loaded = ctypes.CDLL(str(library))

    def call(name: str, x: Tensor, y: Tensor | None = None) -> Tensor:
        out, y = torch.empty_like(x), x if y is None else y
        getattr(loaded, f"smi_{name}")(*(ctypes.c_void_p(t.data_ptr()) for t in (x, y, out)), ctypes.c_long(x.numel()))
        return out

    return call


@pytest.fixture(scope="module")
def emulation(tmp_path_factory) -> ctypes.CDLL:
    return emulated_linear.compile_emulation(tmp_path_factory.mktemp("linear"))


@pytest.fixture
def emulated(emulation, monkeypatch) -> EmulatedLinear:
    """In place of the library: what it would launch, done on the CPU."""
    machine = EmulatedLinear(emulation)
    for operation in ("linear_gelu", "linear_residual"):
        monkeypatch.setattr(versions.load(operation, "cuda"), "library", lambda: machine)
    monkeypatch.setattr(cuda_calls, "multiprocessors", lambda device: MULTIPROCESSORS)
    return machine


@needs_compiler
def test_the_epilogue_computes_gelu_and_its_derivative(functions):
    """At every bfloat16 between -30 and 30, against float64: within the error of the approximation of Phi, 1e-7, and float32's rounding."""
    h = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    h = h[h.abs() < 30].float()
    exact = h.double()
    phi = torch.special.ndtr(exact)
    torch.testing.assert_close(functions("gelu", h).double(), exact * phi, rtol=3e-7, atol=5e-7)
    slope = phi + exact * (-0.5 * exact**2).exp() / (2 * torch.pi) ** 0.5
    torch.testing.assert_close(functions("gelu_slope", h).double(), slope, rtol=3e-7, atol=5e-7)


@needs_compiler
def test_what_is_saved_is_what_the_other_versions_save(functions):
    """So that any version's backward continues any version's forward: `saved_of` and `times_slope` against the reference's raw functions."""
    h, gradient, one = torch.randn(64, 8) * 3, torch.randn(64, 8), torch.eye(8)
    _, saved = versions.load("linear_gelu", "reference").forward(h, one, None, "gelu", True)
    torch.testing.assert_close(functions("saved_of", h), saved, rtol=1e-6, atol=1e-6)
    want = versions.load("linear_residual", "reference").backward_gelu(gradient, one, None, saved)
    torch.testing.assert_close(functions("times_slope", gradient, saved), want, rtol=1e-6, atol=2e-6)


@needs_cutlass
@pytest.mark.parametrize(("kind", "columns", "depth"), sorted(set(LAYERS)))
def test_every_size_of_the_engine_can_be_launched(emulation, kind, columns, depth):
    """can_implement, workspace, shared memory, grid, and tensor maps that cuTensorMapEncodeTiled would take, over the memory that they should be."""
    machine = EmulatedLinear(emulation)
    place = {name: 2**40 + i * 2**36 for i, name in enumerate(("x", "weight", "bias", "gamma", "other", "out", "saved", "workspace"))}
    for rows in ROWS:
        chosen = cuda_calls.choose_division(rows, columns, depth, MULTIPROCESSORS, stream_k=True)
        for division in divisions_of(kind):
            _, launch = machine.describe(kind, rows, columns, depth, division, **place)
            assert launch.possible
            assert launch.workspace == 0 if division != cuda_calls.STREAM_K else launch.workspace < 2**26
            assert launch.workspace > 0 or not division == chosen == cuda_calls.STREAM_K
            tile = cuda_calls.SMALL_TILE if division == cuda_calls.SMALL else cuda_calls.LARGE_TILE
            assert launch.maps[place["x"]].box[1] == tile.BM
            assert 100_000 < launch.shared <= SHARED_LIMIT
            assert (launch.threads, launch.stages >= 3) == (384, True)
            assert 1 <= launch.grid[0] * launch.grid[1] * launch.grid[2] <= MULTIPROCESSORS
            results = {"gelu": ("out", "saved"), "residual": ("out", "other"), "gelu_gradient": ("out", "other")}[kind]
            sizes = {"x": (depth, rows), "weight": (columns, depth) if kind == "gelu_gradient" else (depth, columns)}
            sizes |= dict.fromkeys(results, (columns, rows))
            assert launch.maps.keys() == {place[name] for name in sizes}
            for name, (inner, outer) in sizes.items():
                check_map(launch.maps[place[name]], inner, outer)


def divisions_of(kind: str) -> tuple[int, ...]:
    return tuple(cuda_calls.DIVISIONS) if kind == "residual" else (cuda_calls.LARGE, cuda_calls.SMALL)


def check_map(found: emulated_linear.Map, inner: int, outer: int) -> None:
    """A contiguous matrix [outer, inner], in a map that keeps to the rules of cuTensorMapEncodeTiled."""
    assert found.type in TWO_BYTES
    assert list(found.sizes[: found.rank]) == [inner, outer] + [1] * (found.rank - 2)
    assert found.pitches[1] == 2 * inner
    assert all(pitch % 16 == 0 and pitch < 2**40 for pitch in found.pitches[1 : found.rank])
    assert found.address % 16 == 0
    assert all(1 <= side <= 256 for side in found.box[: found.rank])
    assert found.box[0] * 2 % 16 == 0
    assert found.box[0] * 2 <= SWIZZLE_BYTES[found.swizzle]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def gelu_arguments(rows: tuple[int, ...], k: int, m: int, bias: bool = True) -> dict:
    return {"x": random(*rows, k) * 2, "weight": random(m, k) * k**-0.5, "bias": random(m) if bias else None}


def residual_arguments(rows: tuple[int, ...], k: int, m: int, bias: bool = True, gamma: bool = True) -> dict:
    weights = {"weight": random(m, k) * k**-0.5, "bias": random(m) if bias else None}
    return {"x": random(*rows, k), **weights, "residual": random(*rows, m), "gamma": random(m) if gamma else None}


def hold(name: str, out: Tensor, function, arguments: dict, dtype: torch.dtype) -> None:
    """The error rule for function(**arguments) in `dtype`."""
    rounded = cast(arguments, dtype)
    with same_precision():
        plain = function(**rounded)
    checks.assert_passes(error_of(name, out.cpu(), plain, function(**cast(rounded, torch.float64))))


def slope_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU'(x W^T + b)."""
    h = torch.nn.functional.linear(x, weight, bias)
    return torch.ops.aten.gelu_backward(torch.ones_like(h), h)


def gradient_of(grad: Tensor, weight: Tensor, gamma: Tensor | None, slope: Tensor) -> Tensor:
    return (grad if gamma is None else grad * gamma) @ weight * slope


def check_all(rows: tuple[int, ...], k: int, m: int, dtype: torch.dtype, device: str, bias: bool = True, gamma: bool = True) -> None:
    """Every raw function that is written here, on tensors of `device`, whose memory is NaN where nothing is written."""
    gelu, residual = versions.load("linear_gelu", "cuda"), versions.load("linear_residual", "cuda")

    def there(arguments: dict) -> dict:
        return {name: x.to(device, dtype) if isinstance(x, Tensor) else x for name, x in arguments.items()}

    given = gelu_arguments(rows, k, m, bias)
    with checks.poisoned():
        y, saved = gelu.forward(*there(given).values(), "gelu", True)
        again, nothing = gelu.forward(*there(given).values(), "gelu", False)
    hold("linear_gelu", y, gelu_definition, given, dtype)
    assert torch.equal(again, y)
    assert nothing.numel() == 0
    other = residual_arguments(rows, m, k, bias, gamma)
    with checks.poisoned():
        hold("linear_residual", residual.forward(*there(other).values()), residual_definition, other, dtype)
    gradient = {"grad": random(*rows, k), "weight": other["weight"], "gamma": other["gamma"]}
    hold("slope", saved, slope_of, given, dtype)
    with checks.poisoned():
        dh = residual.backward_gelu(*there(gradient).values(), saved)
    hold("d_h", dh, gradient_of, gradient | {"slope": saved.cpu().double()}, dtype)


@needs_cutlass
@pytest.mark.parametrize(("rows", "k", "m"), [((2, 47), 48, 200), ((131,), 72, 264), ((64,), 8, 8)])
@pytest.mark.parametrize(("bias", "gamma"), [(True, True), (False, False)])
@pytest.mark.parametrize("division", [cuda_calls.LARGE, cuda_calls.SMALL])
def test_operands_strides_and_epilogues_meet_the_error_rule(emulated, monkeypatch, division, rows, k, m, bias, gamma):
    monkeypatch.setattr(cuda_calls, "choose_division", lambda *sizes: division)
    check_all(rows, k, m, torch.bfloat16, "cpu", bias, gamma)


@needs_cutlass
@pytest.mark.parametrize("division", cuda_calls.DIVISIONS)
def test_non_contiguous_and_misaligned_operands(emulated, monkeypatch, division):
    monkeypatch.setattr(cuda_calls, "choose_division", lambda *sizes: division)
    given = residual_arguments((3, 40), 64, 48)
    want = residual_definition(**cast(given, torch.bfloat16))
    given = cast(given, torch.bfloat16)
    given["x"] = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    given["weight"] = given["weight"].T.contiguous().T
    given["bias"] = torch.cat([given["bias"][:1], given["bias"]])[1:]  # starts 2 bytes after a multiple of 16
    assert given["bias"].data_ptr() % 16
    out = residual_cuda.forward(**given)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


def test_what_it_does_not_take():
    assert cuda_calls.linear_supports(64, (3072, 768), torch.bfloat16) is None
    assert "not 63" in cuda_calls.linear_supports(63, (3072, 768), torch.bfloat16)
    assert "multiples of 8, not [3072, 770]" in cuda_calls.linear_supports(64, (3072, 770), torch.bfloat16)
    assert "not float32" in cuda_calls.linear_supports(64, (3072, 768), torch.float32)
    assert "not for quick_gelu" in cuda_calls.linear_supports(64, (3072, 768), torch.bfloat16, "quick_gelu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is interpreted where there is no GPU")
def test_where_cuda_is_asked_for_triton_does_the_rest():
    """So that a whole engine can be forced into CUDA C++: its last block has as many rows as images."""
    x, w = torch.randn(2, 8), torch.randn(8, 8)
    with versions.forced("cuda"):
        assert dispatch.resolve("linear_gelu", "forward", x, w, None, "gelu", True) == "triton"
        assert dispatch.resolve("linear_residual", "forward", x, w, None, x, None) == "triton"
        with pytest.raises(versions.BackendUnavailable, match="attention was asked to run in cuda but cannot"):
            dispatch.resolve("attention", "forward", torch.randn(1, 4, 3, 1, 8), None, None, 1.0)


def test_each_function_asks_about_its_own_arguments(monkeypatch):
    """The activation, and the rows and weight of each raw function, are found where they are."""
    for module in (versions.load("linear_gelu", "cuda"), residual_cuda):
        monkeypatch.setattr(module, "linear_unsupported", lambda x, weight, activation="gelu": (x, weight, activation))
    x, w, h = "rows", "weight", "h"
    gelu = versions.load("linear_gelu", "cuda").unsupported
    assert gelu("forward", x, w, None, "quick_gelu", True) == (x, w, "quick_gelu")
    assert gelu("backward", x, h, w) == (x, w, "gelu")
    assert residual_cuda.unsupported("forward", x, w, None, h, None) == (x, w, "gelu")
    assert residual_cuda.unsupported("backward", x, w, None) == (x, w, "gelu")
    assert residual_cuda.unsupported("backward_gelu", x, w, None, h) == (x, w, "gelu")


def test_gemms_are_divided_where_large_tiles_leave_multiprocessors_idle():
    """DeiT-Base, the table of csrc/README.md: small tiles for few rows, stream-K for long contractions where the last wave is not full."""
    rows, (large, small, stream_k) = (25216, 6016, 3546, 2088, 1044, 522), cuda_calls.DIVISIONS

    def chosen(columns: int, depth: int, **options) -> list[int]:
        return [cuda_calls.choose_division(m, columns, depth, MULTIPROCESSORS, **options) for m in rows]

    assert chosen(768, 3072, stream_k=True) == [large, stream_k, large, stream_k, small, small]
    assert chosen(768, 768, stream_k=True) == [large, large, large, large, small, small]
    assert chosen(3072, 768, exposed=gelu_cuda.EPILOGUE) == [large, large, small, small, small, small]
    assert chosen(3072, 768) == [large] * 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device's own number would be asked")
def test_each_function_asks_for_its_own_division(monkeypatch):
    """By rows, columns and depth of its GEMM, and only linear_residual's forward for stream-K."""
    asked = []
    monkeypatch.setattr(cuda_calls, "multiprocessors", lambda device: MULTIPROCESSORS)
    monkeypatch.setattr(cuda_calls, "choose_division", lambda *sizes: asked.append(sizes) or cuda_calls.SMALL)
    library = types.SimpleNamespace(**dict.fromkeys(("linear_gelu", "linear_residual", "linear_gelu_gradient"), lambda *args: given.append(args[-1])))
    given: list[int] = []
    for module in (gelu_cuda, residual_cuda):
        monkeypatch.setattr(module, "library", lambda: library)
    x, w, y = torch.randn(2, 5, 16), torch.randn(24, 16), torch.randn(2, 5, 24)
    gelu_cuda.forward(x, w, None, "gelu", True)
    residual_cuda.forward(x, w, None, y, None)
    residual_cuda.backward_gelu(y, w, None, x)
    up, down = (10, 24, 16, MULTIPROCESSORS), (10, 16, 24, MULTIPROCESSORS)
    assert asked == [(*up, gelu_cuda.EPILOGUE, False), (*up, 0, True), (*down, 0, False)]
    assert given == [cuda_calls.SMALL] * 3


def test_without_headers_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(build, "BUILT", tmp_path / "none.so")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "nvcc", lambda: shutil.which("true"))
    monkeypatch.setattr(build.re, "search", lambda pattern, text: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "cannot be built: it needs nvcc" in cuda_calls.linear_unavailable.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    assert build.cutlass() is None
    (tmp_path / "include" / "cutlass").mkdir(parents=True)
    (tmp_path / "include" / "cutlass" / "version.h").write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 1\n#define CUTLASS_PATCH 0\n")
    assert build.cutlass_version() == (4, 1, 0)


@pytest.mark.parametrize(("capability", "reason"), [((8, 0), "this device has 8.0"), ((10, 0), "this device has 10.0")])
def test_other_devices_are_told_why(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert cuda_calls.linear_unavailable.__wrapped__() == f"it needs compute capability 9.0, {reason}"


def test_a_library_is_built_for_the_architectures_that_it_is_for():
    assert build.architectures_of(build.ATTENTION, "8.0+PTX;9.0a") == "8.0+PTX;9.0a"
    assert build.architectures_of(build.LINEAR, "8.0+PTX 9.0a") == "9.0a"
    assert build.architectures_of(build.LINEAR, "8.0+PTX") == ""
    assert {path.name for library in build.LIBRARIES for path in build.sources(library)} == {path.name for path in build.FOLDER.glob("*.cu")}
    assert build.installed(build.LINEAR).name == "_linear.abi3.so"


def test_the_pinned_headers_are_those_that_messages_name():
    assert build.CUTLASS in (build.FOLDER.parents[1] / "constraints.txt").read_text().split()


@needs_device
@pytest.mark.parametrize("dtype", cuda_calls.DTYPES)
@pytest.mark.parametrize(("rows", "k", "m"), [((2, 47), 48, 200), ((131,), 72, 264), ((64,), 8, 8), ((18, 29), 768, 3072), ((6016,), 768, 3072)])
@pytest.mark.parametrize(("bias", "gamma"), [(True, True), (False, False)])
def test_linear_layers_on_the_device(rows, k, m, dtype, bias, gamma):
    """The same checks where there is a GPU; stream-K among them, by the sizes."""
    if cuda_calls.linear_unavailable() or cuda_calls.linear_ensure_built():
        pytest.skip(cuda_calls.linear_unavailable() or cuda_calls.linear_ensure_built())
    check_all(rows, k, m, dtype, "cuda", bias, gamma)


@needs_device
@pytest.mark.parametrize("division", cuda_calls.DIVISIONS)
def test_bits_repeat_on_the_device_and_in_a_graph(monkeypatch, division):
    """Twice the same bits, on a stream of its own, captured and replayed."""
    if cuda_calls.linear_unavailable() or cuda_calls.linear_ensure_built():
        pytest.skip(cuda_calls.linear_unavailable() or cuda_calls.linear_ensure_built())
    monkeypatch.setattr(cuda_calls, "choose_division", lambda *sizes: division)
    given = {name: x.to("cuda", torch.bfloat16) for name, x in residual_arguments((6016,), 3072, 768).items()}
    want = residual_cuda.forward(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = residual_cuda.forward(**given)
    for _ in range(3):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)
