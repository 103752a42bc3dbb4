"""Questions about C++ for the CPU compile nothing; what is about to run compiles what is missing, once, and falls back where that fails."""

import pytest
import torch

from smi.csrc import host
from smi.csrc.cache import is_sealed, seal
from smi.kernels import dispatch, versions
from smi.kernels.layer_norm import layer_norm
from smi.kernels.layers import cpp

X, WEIGHT = torch.ones(2, 8), torch.ones(8)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A new process and an empty cache; the libraries that were compiled, which fails."""
    found = []

    def fails(compiler, recipe, target):
        found.append(target.name)
        raise RuntimeError("no such header")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(host, "compiler", lambda: "g++")
    monkeypatch.setattr(host, "_macros", lambda *args: b"")
    monkeypatch.setattr(host, "_compile", fails)
    for library in (host.CPU, host.AUTOGRAD):
        monkeypatch.setattr(library, "loaded", None)
        monkeypatch.setattr(library, "failure", None)
    host.operation.cache_clear()
    dispatch._finder.cache_clear()
    yield found
    host.operation.cache_clear()
    dispatch._finder.cache_clear()


def row(operation: str) -> dispatch.Availability:
    return next(row for row in dispatch.availability() if (row.operation, row.version) == (operation, "cpu"))


def test_a_question_compiles_nothing(compiled, capsys):
    assert host.CPU.why_not() is None
    assert not host.CPU.is_built()
    assert cpp.unsupported(torch.ones(2, 2)) is None
    assert versions.why_not("layer_norm", "cpu", "forward", (X, WEIGHT, None, 1e-6, None)) is None
    assert row("layer_norm")[2:] == (True, "CPU; will be compiled on first use")
    assert compiled == []
    assert capsys.readouterr().err == ""


def test_what_lies_in_the_cache_is_built(compiled):
    recipe = host.CPU.recipe("g++")
    recipe.path(host.CPU.file).parent.mkdir(parents=True)
    recipe.path(host.CPU.file).touch()
    seal(recipe.path(host.CPU.file))
    assert host.CPU.is_built()
    assert not host.AUTOGRAD.is_built()
    assert row("layer_norm").reason == "CPU"


def test_a_build_that_fails_is_reported_once_and_not_tried_again(compiled, capsys):
    for _ in range(3):
        assert dispatch.resolve("layer_norm", "forward", X, WEIGHT, None, 1e-6, None) == "stock"
        torch.testing.assert_close(layer_norm(X, WEIGHT, None, 1e-6)[0], torch.zeros(2, 8))
    assert compiled == ["smi_cpu.so"]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "smi: compiling the CPU kernels for this processor, once (about 10 seconds)",
        "smi: the C++ kernels for the CPU cannot be built here: no such header; PyTorch's own operations run instead",
    ]
    assert "no such header" in host.CPU.why_not()
    assert "no such header" in cpp.unsupported(torch.ones(2, 2))
    assert row("layer_norm")[2:] == (False, host.CPU.why_not())
    with pytest.raises(host.BuildFailed, match="no such header"):
        host.library()
    with versions.forced("cpu"), pytest.raises(versions.BackendUnavailable, match="no such header"):
        layer_norm(X, WEIGHT, None, 1e-6)
    assert compiled == ["smi_cpu.so"]


def test_attention_falls_back_with_its_gradient(compiled, capsys):
    from smi.kernels.attention import attention

    for _ in range(2):
        qkv = torch.ones(1, 5, 3, 2, 16, requires_grad=True)
        attention(qkv).sum().backward()
        assert qkv.grad.isfinite().all()
    assert compiled == ["smi_cpu.so"]
    assert capsys.readouterr().err.count("\n") == 2


def test_without_a_compiler_one_line_says_what_runs(compiled, capsys, monkeypatch):
    monkeypatch.setattr(host, "compiler", lambda: None)
    assert row("layer_norm")[2:] == (False, "the C++ kernels for the CPU need g++ or clang++, and neither is on the PATH")
    assert capsys.readouterr().err == ""
    for _ in range(2):
        layer_norm(X, WEIGHT, None, 1e-6)
    assert capsys.readouterr().err == (
        "smi: the C++ kernels for the CPU need g++ or clang++, and neither is on the PATH; PyTorch's own operations run instead\n"
    )
    assert compiled == []


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "another file": lambda data: b"not a library\n",
}


@pytest.mark.skipif(host.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_library_is_compiled_again(name, tmp_path, monkeypatch, capsys):
    """One that was cut short would end the process by SIGBUS, one of another content compute something else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "answer.cpp").write_text('extern "C" int smi_answer(int x) { return 2 * x; }\n')
    recipe = host.Recipe(["-shared", "-fPIC"], [tmp_path / "answer.cpp"], b"")
    built = [host.Library("the sample", "answer.so", "the sample", "nothing", lambda compiler: recipe, lambda loaded: None) for _ in range(2)]
    path = recipe.path("answer.so")
    path.parent.mkdir(parents=True)
    host._compile(host.compiler(), recipe, path)
    seal(path)
    assert built[0].is_built()
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    assert not built[0].is_built()
    assert built[0].functions().smi_answer(21) == 42
    assert "compiling the sample" in capsys.readouterr().err
    assert is_sealed(path)
    assert built[1].functions().smi_answer(21) == 42
    assert capsys.readouterr().err == ""
