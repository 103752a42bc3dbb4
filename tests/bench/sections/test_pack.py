"""What is carried to a machine without network: sizes, the library, Triton's cache under the key that a launcher asks for."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from bench.measuring import code
from bench.sections import calls, pack, warm
from smi.csrc import build

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty pack of this code."""
    monkeypatch.setattr(pack, "FOLDER", tmp_path / "gpu-pack")
    monkeypatch.setattr(code, "PACKED", str(tmp_path / "gpu-pack/commit.json"))
    monkeypatch.setattr(build, "BUILT", tmp_path / "installed.so")
    monkeypatch.setattr(pack, "build_library", lambda name: "left out")
    monkeypatch.setattr(pack, "warm_cache", lambda jobs: "left out")
    return tmp_path / "gpu-pack"


def test_a_pack_says_what_it_was_made_of_and_fits(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/progress.jsonl").write_text("{}\n")
    assert pack.main(["--earlier", str(tmp_path / "files")]) == 0
    assert json.loads((folder / "commit.json").read_text())["digest"] == code.digest()
    assert [path.name for path in pack.earlier()] == ["earlier-0.jsonl"]
    assert 1 << 20 < pack.total_bytes() < pack.MOST_BYTES
    monkeypatch.setattr(pack, "MOST_BYTES", 1 << 20)
    assert pack.main([]) == 1
    assert "1 at most" in capsys.readouterr().out
    assert pack.earlier() == []


@pytest.mark.parametrize("name", pack.LIBRARIES)
def test_a_library_is_used_if_it_is_of_these_sources_and_loads(folder, monkeypatch, name):
    library, carried = pack.library_of(name)
    pack.main([])
    assert pack.place_library(name) == "none carried: built on first use"
    carried.write_bytes(b"no library")
    assert pack.place_library(name).startswith("carried, but cannot be loaded (")
    assert not build.installed(library).exists()
    monkeypatch.setattr(code, "digest", lambda: "other")
    assert pack.place_library(name) == "carried, but made of other sources: built on first use"
    build.installed(library).touch()
    assert pack.place_library(name) == "installed"


def test_every_library_of_the_package_is_carried():
    assert set(pack.LIBRARIES) == {library.name for library in build.LIBRARIES}


def test_all_that_a_step_calls_is_compiled_ahead():
    found = {(call.operation, call.function) for call in islice(warm.all_calls(), 30)}
    step = {("image_step", "forward"), ("image_step", "tv_norms"), ("linear_residual", "backward_gelu"), ("attention", "backward")}
    assert step <= found


def test_names_of_registered_operations_are_those_of_raw_functions():
    assert calls.raw_function("linear_residual_backward_gelu") == ("linear_residual", "backward_gelu")
    assert calls.raw_function("cls_attention_backward") == ("cls_attention", "backward")
    assert calls.raw_function("image_step_tv_norms") == ("image_step", "tv_norms")
    assert calls.raw_function("attention") == ("attention", "forward")


COMPILE = """\
import sys
from bench.sections import warm
from smi.kernels import versions
compiled = warm.compile_only()
import triton
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
call = next(call for call in warm.all_calls() if (call.operation, call.function) == ("layer_norm", "forward"))
getattr(versions.load(call.operation, "triton"), call.function)(*call.args)
print(hits)
"""


@pytest.mark.slow
def test_kernels_that_were_compiled_ahead_are_found_in_another_place(tmp_path, monkeypatch):
    """The launcher asks Triton's cache for the kernel and finds it, after the cache was copied to another folder, its paths written anew."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_STORE_BINARY_ONLY": "1"}

    def compile_in(folder: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment | {"TRITON_CACHE_DIR": str(folder)}, capture_output=True, text=True
        )
        return done.stdout.strip() or done.stderr

    carried, target = tmp_path / "gpu-pack" / pack.CACHE, tmp_path / "there"
    assert compile_in(carried) == "[False]"
    monkeypatch.setattr(pack, "FOLDER", tmp_path / "gpu-pack")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(target))
    (tmp_path / "gpu-pack" / pack.KEY).write_text(json.dumps(pack.triton_key() | {"ptxas": "another"}))
    assert pack.place_cache() == "carried, but ptxas differ here: compiled on first use"
    (tmp_path / "gpu-pack" / pack.KEY).write_text(json.dumps(pack.triton_key()))
    assert pack.place_cache() == "carried, 1 kernels"
    carried.rename(tmp_path / "gone")
    assert compile_in(target) == "[True]"
