"""Which version runs on a GPU: by verdicts on exactly what is called. Tensors say that they are on a GPU, and a made-up process checks."""

import json

import pytest
import torch

from smi.csrc.cache import cache_folder
from smi.kernels import dispatch, verdicts, verification, versions
from smi.kernels.verdicts import Key, Verdict, verdict_of

pytestmark = pytest.mark.fast

X = torch.ones(2, 8)
ARGS = (X, torch.ones(8), None, 1e-6, None)
GPU = torch.device("cuda", 0)


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    @staticmethod
    def __new__(cls, data=X):
        return torch.Tensor._make_subclass(cls, data)

    device = property(lambda self: GPU)


class Process:
    """In the place of a Checker: records what it is asked and answers what `outcome` and `speedup` say."""

    def __init__(self):
        self.asked, self.outcome, self.speedup = [], "correct", 2.0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def check(self, key, device):
        assert device == GPU
        self.asked.append(key)
        return verdict_of(key, self.outcome, "note", self.speedup)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine that seems to have a GPU, and an empty cache."""
    process = Process()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verification, "_known", {})
    monkeypatch.setattr(verification, "_checker", process)
    monkeypatch.setattr(verification, "Checker", lambda: process)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Imaginary")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(verdicts, "shipped", dict)
    return process


def resolve(*args):
    return dispatch.resolve("layer_norm", "forward", *(args or (OnGPU(), *ARGS[1:])))


def test_first_use_checks_announces_and_keeps(gpu, capsys):
    assert resolve() == "triton"
    assert gpu.asked == [Key("layer_norm", "forward", "triton", "float32", "d64")]
    said = capsys.readouterr().err
    assert "first use of layer_norm forward (triton, float32, d64) on Imaginary: checking it" in said
    assert "correct, 2.00 times the speed of stock PyTorch; used" in said
    assert resolve() == "triton"
    verification._known.clear()  # a new process
    assert resolve() == "triton"
    assert len(gpu.asked) == 1
    assert not capsys.readouterr().err


def test_another_function_dtype_or_size_is_another_verdict(gpu):
    x, wide = OnGPU(), OnGPU(torch.ones(2, 100))
    resolve()
    resolve(OnGPU(X.bfloat16()), *ARGS[1:])
    resolve(wide, *ARGS[1:])
    dispatch.resolve("layer_norm", "backward", x, None, x, ARGS[1], X[:, 0], X[:, 0], 1e-6)
    assert [key[1:] for key in gpu.asked] == [
        ("forward", "triton", "float32", "d64"), ("forward", "triton", "bfloat16", "d64"), ("forward", "triton", "float32", "d128"),
        ("backward", "triton", "float32", "d64"),
    ]  # fmt: skip
    assert len(list(cache_folder("verdicts").iterdir())) == 1
    gpu.outcome = "incorrect"
    dispatch.resolve("layer_norm", "backward", OnGPU(X.half()), None, x, ARGS[1], X[:, 0], X[:, 0], 1e-6)
    assert resolve() == "triton"  # a wrong backward says nothing about another function


def test_the_engine_s_largest_backward_gemm_has_a_verdict_of_its_own(gpu):
    rows, weight, h = OnGPU(torch.ones(5, 8)), torch.ones(8, 16), torch.ones(5, 16)
    assert dispatch.resolve("linear_residual", "backward_gelu", rows, weight, None, h, "gelu") == "triton"
    assert gpu.asked == [Key("linear_residual", "backward_gelu", "triton", "float32", "rows 512")]


def test_what_a_version_takes_from_stock_needs_no_verdict(gpu):
    assert dispatch.resolve("linear_residual", "backward", OnGPU(torch.ones(5, 8)), torch.ones(8, 16), None) == "stock"
    assert not gpu.asked


@pytest.mark.parametrize(("outcome", "speedup"), [("incorrect", 0.0), ("correct", 0.9), ("failed", 0.0), ("unsupported", 0.0), ("crashed", 0.0)])
def test_what_is_not_shown_to_be_correct_and_faster_is_not_used(gpu, capsys, outcome, speedup):
    gpu.outcome, gpu.speedup = outcome, speedup
    assert resolve() == "stock"
    assert resolve() == "stock"
    assert len(gpu.asked) == 1
    assert capsys.readouterr().err.count("; not used") == 1
    (row,) = dispatch.known_verdicts()["cuda:0"]  # what smi info shows
    assert (row.outcome, row.chosen) == (outcome, False)


def test_a_crash_is_shown_and_not_relied_on(gpu):
    gpu.outcome = "crashed"
    assert resolve() == "stock"
    verification._known.clear()  # a new process
    gpu.outcome = "correct"
    assert resolve() == "triton"
    assert [v.outcome for v in dispatch.known_verdicts()["cuda:0"]] == ["correct"]


def test_version_that_cannot_be_built_is_not_used(gpu, monkeypatch):
    monkeypatch.setattr(versions.load("layer_norm", "triton"), "ensure_built", lambda: "no compiler", raising=False)
    assert resolve() == "stock"
    assert not gpu.asked
    assert [v.outcome for v in dispatch.known_verdicts()["cuda:0"]] == ["unsupported"]
    with versions.forced("triton"), pytest.raises(versions.BackendUnavailable, match="cannot: no compiler"):
        resolve()


def row(**changes):
    about = verdicts.identity("layer_norm", GPU)
    made = {name: about[name] for name in verdicts.COMPILED_BY}
    return made | Verdict("layer_norm", "forward", "triton", "float32", "d64", "correct", 1.5, "")._asdict() | changes


def test_committed_verdict_spares_the_check(gpu, monkeypatch):
    monkeypatch.setattr(verdicts, "shipped", lambda: {"sm_90": [row()]})
    assert resolve() == "triton"
    assert not gpu.asked


@pytest.mark.parametrize("change", [{"triton": "9.9"}, {"ptxas": "13.1"}, {"source": "0"}, {"function": "backward"}, {"size": "d128"}])
def test_committed_verdict_on_other_code_does_not(gpu, monkeypatch, change):
    monkeypatch.setattr(verdicts, "shipped", lambda: {"sm_90": [row(**change)]})
    assert resolve() == "triton"
    assert len(gpu.asked) == 1


def test_other_versions_or_sources_ask_for_a_new_check(gpu, monkeypatch):
    resolve()
    before = verdicts.identity
    changes = [{name: "another"} for name in ("device", "architecture", "torch", "triton", "ptxas", "smi", "source")]
    for change in changes:
        verification._known.clear()
        monkeypatch.setattr(verdicts, "identity", lambda *a, change=change: before(*a) | change)
        resolve()
    assert len(gpu.asked) == 1 + len(changes)


@pytest.mark.parametrize("file", ["csrc/cuda/tile.cuh", "csrc/build.py", "kernels/attention/kernel.py", "kernels/matmul.py"])
def test_another_source_is_another_identity(gpu, monkeypatch, tmp_path, file):
    found = verdicts.sources("attention")
    before = verdicts.identity("attention", GPU)["source"]
    (path,) = (path for path in found if path.as_posix().endswith(f"/{file}"))
    (tmp_path / "changed").write_text(path.read_text() + " ")
    monkeypatch.setattr(verdicts, "sources", lambda operation: [tmp_path / "changed" if other == path else other for other in found])
    assert verdicts.identity("attention", GPU)["source"] != before


def test_layers_and_other_operations_are_not_part_of_a_verdict():
    folders = {path.parent.name for path in verdicts.sources("attention")}
    assert folders >= {"kernels", "attention", "cuda", "csrc"}
    assert not folders & {"layers", "layer_norm", "cpu"}
    assert "linear_gelu" in {path.parent.name for path in verdicts.sources("linear_residual")}  # from which it imports


def test_the_assembler_is_the_one_that_triton_would_run(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.1, V13.1.80\n")
    other.chmod(0o755)
    verdicts.ptxas.cache_clear()
    shipped = verdicts.ptxas((9, 0))
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    verdicts.ptxas.cache_clear()
    assert verdicts.ptxas((9, 0)) == "13.1.80" != shipped
    verdicts.ptxas.cache_clear()


DAMAGED = ["", "{", "[]", '{"identity": {}}', '{"verdicts": [1]}', "[" * 100_000, "speedup: fast", "speedup: NaN", "outcome: 1", "note: null"]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:20])
def test_damaged_cache_file_is_replaced(gpu, content):
    """Also one whose verdict has a field of another type, which would fail where versions are sorted by their speed."""
    resolve()
    (path,) = cache_folder("verdicts").iterdir()
    if ": " in content and content[0] != "{":
        name, token = content.split(": ")
        held = json.loads(path.read_text())
        held["verdicts"][0][name] = {"NaN": float("nan"), "1": 1, "null": None}.get(token, token)
        content = json.dumps(held)
    path.write_text(content)
    verification._known.clear()
    assert resolve() == "triton"
    assert len(gpu.asked) == 2
    assert json.loads(path.read_text())["verdicts"][0]["speedup"] == 2


def test_cache_that_cannot_be_written_is_reported(gpu, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert resolve() == "triton"
    assert "could not be kept" in capsys.readouterr().err


def test_no_check_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(versions.BackendUnavailable, match="while a CUDA graph is captured"):
        resolve()


def test_where_no_process_can_be_started_nothing_is_chosen(gpu, capsys, monkeypatch):
    def check(key, device):
        raise OSError("too many processes")

    monkeypatch.setattr(gpu, "check", check)
    assert resolve() == "stock"
    assert "no process can be started to check it: too many processes; not used" in capsys.readouterr().err


def test_verify_checks_every_gpu_version_again(gpu, monkeypatch):
    monkeypatch.setattr(versions, "ensure_built", lambda operation, version: None)  # CUDA C++ takes minutes
    resolve()
    found = list(dispatch.verify("cuda", ["layer_norm", "linear_residual"]))  # a device without a number, as --device cuda gives it
    assert [v.key for v in found] == gpu.asked[1:]
    norms = [key for key in gpu.asked[1:] if key.operation == "layer_norm"]
    assert {(key.function, key.dtype) for key in norms} == {(f, d) for f in ("forward", "backward") for d in ("bfloat16", "float16", "float32")}
    assert {key.function for key in gpu.asked[1:] if key.operation == "linear_residual"} == {"forward", "backward_gelu"}
    assert {(key.dtype, key.size) for key in gpu.asked[1:5]} == {("bfloat16", "d1024"), ("bfloat16", "rows more")}  # the usual first
    gpu.asked.clear()
    assert resolve() == "triton"
    assert not gpu.asked


def test_the_command_verify_runs(gpu, capsys):
    """Through the command line down to the process that checks: `--device cuda` names no number."""
    from smi.cli.main import run

    assert run(["verify", "--only", "layer_norm", "--json"]) == 0
    out, err = capsys.readouterr()
    found = [Verdict(**each) for each in json.loads(out)]
    assert [v.key for v in found] == gpu.asked
    assert f"{found[0].key}: correct" in err
    assert run(["verify", "--device", "cuda:1"]) == 2
    assert "'cuda:1' is none here" in capsys.readouterr().err
