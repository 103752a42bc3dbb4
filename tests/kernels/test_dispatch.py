import json

import pytest
import torch

from smi.csrc.cache import cache_folder
from smi.kernels import dispatch, verification, versions
from smi.kernels.verification import Verdict

pytestmark = pytest.mark.fast

X = torch.ones(2, 8)
ARGS = (X, torch.ones(8), None, 1e-6, None)


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    @staticmethod
    def __new__(cls, data=X):
        return torch.Tensor._make_subclass(cls, data)

    device = property(lambda self: torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine that seems to have a GPU, an empty cache, and a self-check that records its calls and returns what `verdicts` says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verification, "_known", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Imaginary")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(verification, "committed", lambda arch: [])
    state = {"calls": [], "correct": True, "speedup": 2.0}

    def check(operation, version, device, dtype, size):
        state["calls"].append((operation, version, dtype, size))
        return Verdict(operation, version, dtype, size, state["correct"], state["speedup"], "note")

    monkeypatch.setattr(verification, "self_check", check)
    return state


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


def test_gpu_first_use_checks_announces_and_keeps(gpu, capsys):
    assert resolve(OnGPU(), *ARGS[1:]) == "triton"
    assert gpu["calls"] == [("layer_norm", "triton", "float32", "any")]
    said = capsys.readouterr().err
    assert "first use of layer_norm (triton, float32, any sizes) on Imaginary: checking it" in said
    assert "correct, 2.00 times the speed of stock PyTorch; used" in said
    assert resolve(OnGPU(), *ARGS[1:]) == "triton"
    verification._known.clear()  # a new process
    assert resolve(OnGPU(), *ARGS[1:]) == "triton"
    assert len(gpu["calls"]) == 1
    assert not capsys.readouterr().err
    assert resolve(OnGPU(X.bfloat16()), *ARGS[1:]) == "triton"
    assert len(gpu["calls"]) == 2  # another dtype is another verdict, in the same file
    assert len(list(cache_folder("verdicts").iterdir())) == 1


@pytest.mark.parametrize(("correct", "speedup"), [(False, 0.0), (True, 0.9)])
def test_gpu_version_that_is_wrong_or_slow_is_not_used(gpu, capsys, correct, speedup):
    gpu.update(correct=correct, speedup=speedup)
    assert resolve(OnGPU(), *ARGS[1:]) == "stock"
    assert "; not used" in capsys.readouterr().err


def test_gpu_version_that_cannot_be_built_is_not_used(gpu, monkeypatch):
    monkeypatch.setattr(versions.load("layer_norm", "triton"), "ensure_built", lambda: "no compiler", raising=False)
    assert resolve(OnGPU(), *ARGS[1:]) == "stock"
    with versions.forced("triton"), pytest.raises(versions.BackendUnavailable, match="cannot: no compiler"):
        resolve(OnGPU(), *ARGS[1:])


def test_committed_verdict_spares_the_check(gpu, monkeypatch):
    rows = [Verdict("layer_norm", "triton", "float32", "any", True, 1.5, "")]
    monkeypatch.setattr(verification, "committed", lambda arch: rows if arch == "sm_90" else [])
    assert resolve(OnGPU(), *ARGS[1:]) == "triton"
    assert not gpu["calls"]


def test_other_versions_or_sources_ask_for_a_new_check(gpu, monkeypatch):
    resolve(OnGPU(), *ARGS[1:])
    for change in ({"torch": "9.9"}, {"device": "Another"}, {"source": "0"}):
        verification._known.clear()
        before = verification.identity
        monkeypatch.setattr(verification, "identity", lambda *a, before=before, change=change: before(*a) | change)
        resolve(OnGPU(), *ARGS[1:])
    assert len(gpu["calls"]) == 4


@pytest.mark.parametrize("file", ["csrc/cuda/tile.cuh", "csrc/build.py", "kernels/attention/kernel.py", "kernels/matmul.py"])
def test_another_source_is_another_identity(gpu, monkeypatch, tmp_path, file):
    found, device = verification.sources("attention"), torch.device("cuda", 0)
    before = verification.identity("attention", device)["source"]
    (path,) = (path for path in found if path.as_posix().endswith(f"/{file}"))
    (tmp_path / "changed").write_text(path.read_text() + " ")
    monkeypatch.setattr(verification, "sources", lambda operation: [tmp_path / "changed" if other == path else other for other in found])
    assert verification.identity("attention", device)["source"] != before


def test_layers_and_other_operations_are_not_part_of_a_verdict():
    folders = {path.parent.name for path in verification.sources("attention")}
    assert folders >= {"kernels", "attention", "cuda", "csrc"}
    assert not folders & {"layers", "layer_norm", "cpu"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"identity": {}}', '{"verdicts": [1]}'])
def test_damaged_cache_file_is_replaced(gpu, content):
    resolve(OnGPU(), *ARGS[1:])
    (path,) = cache_folder("verdicts").iterdir()
    path.write_text(content)
    verification._known.clear()
    assert resolve(OnGPU(), *ARGS[1:]) == "triton"
    assert len(gpu["calls"]) == 2
    assert json.loads(path.read_text())["verdicts"][0]["speedup"] == 2


def test_cache_that_cannot_be_written_is_reported(gpu, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert resolve(OnGPU(), *ARGS[1:]) == "triton"
    assert "could not be kept" in capsys.readouterr().err


def test_no_check_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(versions.BackendUnavailable, match="while a CUDA graph is captured"):
        resolve(OnGPU(), *ARGS[1:])


def test_out_of_memory_is_not_kept(gpu, monkeypatch, capsys):
    def check(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(verification, "self_check", check)
    assert resolve(OnGPU(), *ARGS[1:]) == "stock"
    assert "not enough free memory" in capsys.readouterr().err
    assert not cache_folder("verdicts").exists()


def test_self_check_of_what_runs_here(monkeypatch):
    """The self-check itself, on the CPU: stock against itself passes, a wrong version does not, an exception is a verdict."""
    from smi.kernels.layer_norm import op, stock

    small = op.example("cpu", torch.float32)
    small = type(small)(small.function, small.reference, small.arguments | {k: small.arguments[k][:64] for k in ("x", "residual")}, small.inputs)
    monkeypatch.setattr(op, "example", lambda *args: small)
    device = torch.device("cpu")
    verdict = verification.self_check("layer_norm", "stock", device, "float32", "any")
    assert verdict.correct
    assert verdict.speedup > 0
    assert "allowed" in verdict.note
    right = stock.backward
    monkeypatch.setattr(stock, "backward", lambda *args: right(*args) * 1.001)
    verdict = verification.self_check("layer_norm", "stock", device, "float32", "any")
    assert not verdict.correct
    assert not verdict.chosen
    assert "in d_" in verdict.note

    def broken(*args):
        raise RuntimeError("does not compile")

    monkeypatch.setattr(stock, "forward", broken)
    assert "does not compile" in verification.self_check("layer_norm", "stock", device, "float32", "any").note


def test_verify_checks_every_gpu_version_again(gpu, monkeypatch):
    monkeypatch.setattr(versions, "OPERATIONS", ("layer_norm",))
    resolve(OnGPU(), *ARGS[1:])
    rows = dispatch.verify("cuda")
    assert {(r.version, r.dtype) for r in rows} == {("triton", d) for d in ("bfloat16", "float16", "float32")}
    assert {r.operation for r in rows} == {"layer_norm"}
    assert len(gpu["calls"]) == len(rows) + 1
    gpu["calls"].clear()
    assert resolve(OnGPU(), *ARGS[1:]) == "triton"
    assert not gpu["calls"]


def test_nothing_happens_at_import():
    """Importing the package or an operation imports no triton and touches no device."""
    import subprocess
    import sys

    code = "import sys, smi.kernels, smi.kernels.layer_norm, smi.kernels.dispatch, torch; print('triton' in sys.modules, torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
