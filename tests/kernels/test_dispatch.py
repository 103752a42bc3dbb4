import pytest
import torch

from smi.kernels import dispatch, versions

pytestmark = pytest.mark.fast

X = torch.ones(2, 8)
ARGS = (X, torch.ones(8), None, 1e-6, None)


def resolve(*args):
    return dispatch.resolve("layer_norm", "forward", *(args or ARGS))


def on_cpu() -> str:
    """What layer_norm takes on the CPU in float32: its C++, where there is a compiler."""
    return "stock" if versions.load("layer_norm", "cpu").unavailable() else "cpu"


def test_auto_on_the_cpu_is_never_interpreted():
    assert versions.interpreting() or torch.cuda.is_available()
    assert resolve() == on_cpu()


def test_float64_on_the_cpu_has_a_version():
    assert resolve(X.double(), *ARGS[1:]) == "stock"


@pytest.mark.parametrize("name", ["reference", "stock", "TRITON ", "cuda"])
def test_environment_is_read_at_every_call(monkeypatch, name):
    monkeypatch.setenv("SMI_BACKEND", name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve() == {"cuda": "triton"}.get(name, name.strip().lower())  # layer_norm is not written in CUDA C++
    monkeypatch.setenv("SMI_BACKEND", "auto")
    assert resolve() == on_cpu()


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("SMI_BACKEND", "fast")
    with pytest.raises(versions.BackendUnavailable, match="SMI_BACKEND=fast is not a backend: use one of auto, reference"):
        resolve()


def test_forced_version_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setenv("SMI_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(versions.BackendUnavailable, match="layer_norm was asked to run in triton but cannot: Triton needs tensors on a CUDA device"):
        resolve()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(versions.BackendUnavailable, match="not float64"):
        resolve(X.double(), *ARGS[1:])
    with pytest.raises(versions.BackendUnavailable, match="its rows have 8193 columns, 8192 at most fit"):
        resolve(torch.ones(1, 8193), torch.ones(8193), None, 1e-6, None)


def test_a_version_that_cannot_be_imported_says_so(monkeypatch):
    def broken(name):
        if name.endswith("kernel"):
            raise ImportError("no triton here")
        return importlib_import(name)

    importlib_import = versions.import_module
    monkeypatch.setattr(versions, "import_module", broken)
    monkeypatch.setattr(versions, "load", versions.load.__wrapped__)  # which keeps what it has loaded
    monkeypatch.setenv("SMI_BACKEND", "triton")
    with pytest.raises(versions.BackendUnavailable, match="layer_norm in triton cannot be loaded: no triton here"):
        resolve()
    assert ("layer_norm", "triton", False, "layer_norm in triton cannot be loaded: no triton here") in dispatch.availability()


def test_forced_holds_within_and_not_after():
    with versions.forced("reference"):
        assert resolve() == "reference"
        with versions.forced("stock"):
            assert resolve() == "stock"
        assert resolve() == "reference"
    assert resolve() == on_cpu()


@pytest.mark.parametrize("operation", ["attention", "cls_attention", "layer_norm", "linear_gelu", "linear_residual", "patch_embed", "image_step"])
def test_every_operation_has_a_stock_composition(operation):
    """What runs on a GPU where nothing is verified, and what a self-check is timed against."""
    assert versions.exists(operation, "stock")


def test_availability_names_every_version_with_a_reason(monkeypatch):
    rows = dispatch.availability()
    assert {row.operation for row in rows} == set(versions.OPERATIONS)
    assert all(isinstance(row.available, bool) for row in rows)
    assert all(row.reason for row in rows)
    assert ("layer_norm", "reference", True, "any device") in rows
    if not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET")
        assert ("layer_norm", "triton", False, "no CUDA device") in dispatch.availability()


def test_nothing_happens_at_import():
    """Importing the package or an operation imports no triton and touches no device."""
    import subprocess
    import sys

    code = "import sys, smi.kernels, smi.kernels.layer_norm, smi.kernels.dispatch, torch; print('triton' in sys.modules, torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
