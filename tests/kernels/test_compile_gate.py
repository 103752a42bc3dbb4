"""Kernels compiled ahead of time for every architecture are what the committed file says: no spills, and no change unseen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gates import compiled, cubin, nvcc
from smi.kernels import versions

ROOT = Path(__file__).parents[2]
WITH_TRITON = [operation for operation in versions.OPERATIONS if versions.exists(operation, "triton")]
PARTS = {"attention": 8, "cls_attention": 2, "csrc": 2}  # about a minute each, so that two processes share them evenly
GATES = [(name, f"{i}/{PARTS.get(name, 1)}") for name in [*WITH_TRITON, "csrc"] for i in range(1, PARTS.get(name, 1) + 1)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "part"), GATES, ids=lambda value: value.replace("/", "of"))
def test_gate(name, part):
    """In a process of its own, in which Triton compiles instead of interpreting."""
    if name == "csrc" and not nvcc.found():
        pytest.skip("nvcc is not found: csrc cannot be compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gates.compiled", "--check", "--only", name, "--part", part, "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_committed_file_names_what_ships():
    """Every configuration for every architecture it is for, and nothing else; all parts together are the whole."""
    cases = compiled.triton_cases(None)
    wanted = {case.name: {f"sm_{a}" for a in case.architectures or compiled.ARCHITECTURES} for case in cases}
    committed = json.loads(compiled.RESULTS.read_text())["kernels"]
    assert {name: set(found) for name, found in committed.items() if not name.startswith("csrc/")} == wanted
    parts = [case.name for i in range(1, 9) for case in compiled.triton_cases(["attention"], (i, 8))]
    assert sorted(parts) == sorted(name for name in wanted if name.startswith("attention/"))


def test_no_committed_configuration_spills():
    assert not compiled.faults(json.loads(compiled.RESULTS.read_text()))


def test_a_part_is_held_against_its_part_only(capsys):
    facts = {"stack": 0, "spill_ops": 0, "shared": 0, "registers": 32, "code": "0"}
    names = [f"layer_norm/{i}" for i in range(20)]
    committed = {"versions": {}, "kernels": {name: {"sm_80": facts} for name in names}}
    for i in (1, 2):
        mine = {"versions": {}, "kernels": {n: {"sm_80": facts | {"code": "1"}} for n in names if compiled.in_part(n, (i, 2))}}
        assert 0 < len(mine["kernels"]) < 20
        assert compiled.check(mine, committed, None, (i, 2)) == 0  # other code with the same numbers is no difference
        del mine["kernels"][next(iter(mine["kernels"]))]
        assert compiled.check(mine, committed, None, (i, 2)) == 1


def test_an_update_of_a_part_keeps_the_rest(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "RESULTS", tmp_path / "gate.json")
    names = [f"layer_norm/{i}" for i in range(20)] + ["csrc/a/b", "attention/x"]
    committed = {"versions": {"nvcc": "1"}, "kernels": {name: {"sm_80": {"registers": 1}} for name in names}}
    now = {"versions": {"triton": "3"}, "kernels": {n: {"sm_80": {"registers": 2}} for n in names[:20] if compiled.in_part(n, (1, 2))}}
    compiled.update(now, committed, ["layer_norm"], (1, 2))
    written = json.loads((tmp_path / "gate.json").read_text())
    assert set(written["kernels"]) == set(names)
    assert {n for n, on in written["kernels"].items() if on["sm_80"]["registers"] == 2} == set(now["kernels"])
    compiled.update({"versions": {}, "kernels": {}}, committed, None, None)  # no nvcc here
    assert set(json.loads((tmp_path / "gate.json").read_text())["kernels"]) == {"csrc/a/b"}


def elf(**sections: bytes) -> bytes:
    """The least of an ELF file: section headers, their names, their contents."""
    names = b"\0" + b"".join(f".{name}".replace("__", ".").encode() + b"\0" for name in sections) + b".shstrtab\0"
    header, contents = 64, [*sections.values(), names]
    table = header + sum(map(len, contents))
    found = bytearray(header)
    found[0x28:0x30] = table.to_bytes(8, "little")
    for at, value in ((0x3A, 64), (0x3C, len(contents)), (0x3E, len(contents) - 1)):
        found[at : at + 2] = value.to_bytes(2, "little")
    rows, place, label = b"", header, 1
    for name, content in zip([*sections, "shstrtab"], contents, strict=True):
        rows += label.to_bytes(4, "little") + bytes(20) + place.to_bytes(8, "little") + len(content).to_bytes(8, "little") + bytes(24)
        place, label = place + len(content), label + len(name.replace("__", ".")) + 2
    return bytes(found) + b"".join(contents) + rows


def test_digests_are_of_the_code_alone():
    one = cubin.digests(elf(text__kernel=b"code", debug=b"line 1"))
    assert list(one) == ["kernel"]
    assert one == cubin.digests(elf(debug=b"line 2", text__kernel=b"code"))
    assert one != cubin.digests(elf(text__kernel=b"cade", debug=b"line 1"))


def test_known_code_is_not_disassembled(monkeypatch):
    binary, asked = elf(text__kernel=b"code"), []

    def run(*command):
        asked.append("-sass" in command)
        return "REG:32 STACK:0 SHARED:0\n" + ("  /*0010*/   STL [R1], R2 ;" if "-sass" in command else "")

    monkeypatch.setattr(cubin, "run", run)
    first = cubin.facts(binary)
    assert first["spill_ops"] == 1
    assert cubin.facts(binary, first) == first
    assert cubin.facts(elf(text__kernel=b"else"), first)["code"] != first["code"]
    assert asked == [True, False, True]


def test_every_operation_of_a_fused_step_has_kernels():
    assert set(WITH_TRITON) >= {"patch_embed", "attention", "cls_attention", "layer_norm", "linear_gelu", "linear_residual", "image_step"}
