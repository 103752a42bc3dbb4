"""Kernels compiled ahead of time for every architecture are what the committed file says: no spills, and no change unseen."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from bench.gates import compiled, cubin, nvcc
from bench.measuring.record import ROOT
from smi.kernels import matmul, versions
from smi.kernels.compile_case import SMALL, SMALLEST, CompileCase

WITH_TRITON = [operation for operation in versions.OPERATIONS if versions.exists(operation, "triton")]
PARTS = {"attention": 8, "cls_attention": 2, "csrc": 2}  # about a minute each, so that two processes share them evenly
LARGE = 72 * 1024  # bytes: few kernels take more
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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_needs_most_shared_memory_fits_where_there_is_least():
    """The cheap part of it: `python -m bench.check --full` compiles all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gates.compiled", "--small", "--least", str(LARGE), "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "fit without spills on sm_86, sm_89, sm_120" in done.stdout


def test_what_ships_for_least_memory():
    """What sm_80 takes, where it needs no more; what sm_90 alone takes does not."""
    small = {case.name for case in compiled.triton_cases(None) if compiled.ships_for(case)[-1] == SMALL[-1]}
    committed = json.loads(compiled.COMMITTED.read_text())["kernels"]
    assert {name for name in small & set(committed) if committed[name]["sm_80"]["shared"] > SMALLEST * 1024} == set()
    assert {name.rsplit("/", 1)[0] for name in small - set(committed)} == {"attention/bwd-queries-small"}
    assert "linear_gelu/fwd/bf16_128x128x64_for_sm80" in small
    assert not {name for name in small if name.startswith("attention/bwd-n256/bf16-d64")}
    assert compiled.faults(gate({"triton": "1"}, a=facts()) | {"kernels": {"x": {"sm_120": facts(shared=106624)}}})


def test_the_bound_of_shared_memory_of_a_gemm_is_one():
    """By which tiles are left out: never less than the compiler takes, 16 bytes of barriers on sm_100 apart."""
    committed = json.loads(compiled.COMMITTED.read_text())["kernels"]
    met = 0
    for operation in ("linear_gelu", "linear_residual"):
        kernel = versions.load(operation, "triton")
        for case in kernel.compile_cases():
            left = 2 if case.name.startswith("linear_gelu/bwd") else 1
            tile = matmul.Tile(case.constants["BM"], case.constants["BN"], case.constants["BK"], case.num_warps, case.num_stages)
            for facts_of in committed[case.name].values():
                assert facts_of["shared"] <= matmul.shared_bytes(tile, 2 if "bf16" in case.name else 4, left) + 16
                met += 1
    assert met > 40


def test_the_committed_file_names_what_ships():
    """Every configuration for every architecture it is for, and nothing else; all parts together are the whole."""
    cases = compiled.triton_cases(None)
    held = {case.name: {f"sm_{a}" for a in compiled.ships_for(case) if a in compiled.ARCHITECTURES} for case in cases}
    wanted = {name: architectures for name, architectures in held.items() if architectures}  # the others are compiled, and not compared
    for path in (compiled.COMMITTED, compiled.NEWEST):
        committed = json.loads(path.read_text())["kernels"]
        assert {name: set(found) for name, found in committed.items() if not nvcc.group_of(name)} == wanted
    parts = [case.name for i in range(1, 9) for case in compiled.triton_cases(["attention"], (i, 8))]
    assert sorted(parts) == sorted(name for name in held if name.startswith("attention/"))


def test_a_source_that_the_file_holds_is_not_compiled_again(monkeypatch):
    """One in sixteen apart, which are compiled all the same."""
    triton = pytest.importorskip("triton")
    held = {"now": "source"}
    monkeypatch.setattr("triton.compiler.ASTSource", lambda **kwargs: SimpleNamespace(hash=lambda: held["now"]))
    code = SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(shared=1))
    compilations = []
    monkeypatch.setattr(triton, "compile", lambda *args, **kwargs: compilations.append(kwargs) or code)
    monkeypatch.setattr(cubin, "facts", lambda binary, known: facts())
    cases = [CompileCase(f"layer_norm/{i}", SimpleNamespace(arg_names=[]), {}, {}) for i in range(64)]

    def compiled_of(known, **options):
        compilations.clear()
        return [compiled.compile_triton(case, 80, each, **options) for case, each in zip(cases, known, strict=True)], len(compilations)

    first, count = compiled_of([None] * 64)
    assert count == 64
    again, count = compiled_of(first, always=False)
    assert again == first
    assert 0 < count < 16
    assert compiled_of(first)[1] == 64
    held["now"] = "another source"
    assert compiled_of(first, always=False)[1] == 64
    held["now"], cases = "source", [replace(case, num_warps=8) for case in cases]
    assert compiled_of(first, always=False)[1] == 64


def test_no_committed_configuration_spills():
    assert not compiled.faults(json.loads(compiled.COMMITTED.read_text()))


def test_what_the_newest_triton_spills_is_known():
    """Open: seven loads and stores at most, most of them for sm_100. With that Triton `test_gate` reports them."""
    found = compiled.faults(json.loads(compiled.NEWEST.read_text()))
    assert {line.split(":")[0] for line in found} == {
        "attention/bwd-keys/bf16-d128-gathered sm_100",
        "attention/bwd-keys/bf16-d16 sm_100",
        "attention/bwd-n128-sm90/bf16-d128 sm_100",
        "attention/bwd-n128-sm90/bf16-d128-gathered sm_100",
        "attention/fwd-nany/bf16-d80-gathered sm_80",
        "attention/fwd-nany/fp32-d128-gathered sm_90",
        "cls_attention/fwd/fp32-d64-p1-many sm_80",
        "image_step/adam/p16 sm_100",
        "image_step/adam/p8 sm_100",
    }
    assert all(int(line.split()[-5]) <= 7 for line in found)


def test_the_triton_in_use_decides_what_it_is_held_against(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "COMMITTED", tmp_path / "gate.json")
    monkeypatch.setattr(compiled, "NEWEST", tmp_path / "newest.json")
    monkeypatch.setattr(cubin, "compiler_versions", lambda: {"triton": "2"})
    assert compiled.committed_for("1")[0] == compiled.COMMITTED  # nothing is committed yet
    both = {"versions": {"triton": "1", "nvcc": "5"}, "kernels": {"layer_norm/a": {}, "csrc/b": {}}}
    compiled.update(both, *compiled.committed_for("1"), None, None)
    assert compiled.committed_for("1")[1]["kernels"] == {"layer_norm/a": {}, "csrc/b": {}}
    path, committed = compiled.committed_for("2")
    assert path == compiled.NEWEST
    assert committed["kernels"] == {"csrc/b": {}}
    compiled.update(gate({"triton": "2"}, a=facts()), path, committed, None, None)
    assert json.loads(path.read_text()) == gate({"triton": "2"}, a=facts())  # what nvcc compiles stands in the other file alone
    assert compiled.committed_for("3")[1]["versions"] == {"triton": "2", "nvcc": "5"}  # held against it no number, only reported


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
    monkeypatch.setattr(compiled, "COMMITTED", tmp_path / "gate.json")
    names = [f"layer_norm/{i}" for i in range(20)] + ["csrc/a/b", "attention/x"]
    committed = {"versions": {"nvcc": "1"}, "kernels": {name: {"sm_80": {"registers": 1}} for name in names}}
    now = {"versions": {"triton": "3"}, "kernels": {n: {"sm_80": {"registers": 2}} for n in names[:20] if compiled.in_part(n, (1, 2))}}
    compiled.update(now, compiled.COMMITTED, committed, ["layer_norm"], (1, 2))
    written = json.loads((tmp_path / "gate.json").read_text())
    assert set(written["kernels"]) == set(names)
    assert {n for n, on in written["kernels"].items() if on["sm_80"]["registers"] == 2} == set(now["kernels"])
    compiled.update({"versions": {}, "kernels": {}}, compiled.COMMITTED, committed, None, None)  # no nvcc here
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


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E R5, desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0040*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0070*/                   STL [R1], R2 ;
        /*0080*/               @P1 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   BRA 0x90;
        /*00a0*/                   NOP;
"""


def test_instruction_counts():
    counts = cubin.instruction_counts(SASS)
    assert counts["mma"] == {"HGMMA": 1, "HMMA": 1}
    assert counts["instructions"] == 9
    assert [counts[k] for k in ("loads_128", "loads_other", "async_128", "async_other", "bulk", "spill_ops")] == [1, 1, 1, 0, 1, 1]
    assert [counts[k] for k in ("stores_128", "stores_other")] == [1, 0]


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
"""


def test_report_of_ptxas():
    assert nvcc.parse_report(PTXAS) == {
        "_Z1aPf": {"registers": 32, "stack": 16, "shared": 1024},
        "_Z1bPf": {"registers": 8, "stack": 0, "shared": 0},
    }


def facts(**changes):
    return {"stack": 0, "spill_ops": 0, "shared": 0, "registers": 32} | changes


def gate(versions, **kernels):
    return {"versions": versions, "kernels": {f"layer_norm/{name}": {"sm_80": value} for name, value in kernels.items()}}


def test_gate_fails_on_a_change_with_the_same_compilers_only(capsys):
    before = gate({"triton": "1"}, a=facts(), b=facts())
    assert compiled.check(before, before, None) == 0
    after = gate({"triton": "1"}, a=facts(registers=40), b=facts())
    assert compiled.check(after, before, None) == 1
    assert "layer_norm/a" in capsys.readouterr().out
    assert compiled.check(gate({"triton": "1"}, a=facts()), before, None) == 1  # a kernel that went
    assert compiled.check(gate({"triton": "2"}, a=facts(registers=40), b=facts()), before, None) == 0
    assert "not held against it: compilers are {'triton': '2'}" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "text"), [({"stack": 8}, "spills"), ({"spill_ops": 1}, "spills"), ({"shared": 166913}, "at most fit")])
def test_gate_fails_on_a_spill_whatever_is_committed(change, text, capsys):
    bad = gate({"triton": "9"}, a=facts(**change))
    assert compiled.check(bad, bad, None) == 1
    assert text in capsys.readouterr().out


def test_gate_looks_only_at_what_was_compiled():
    committed = {"versions": {}, "kernels": {"attention/x": {}, "csrc/attention/y": {"sm_80": facts()}, "layer_norm/a": {"sm_80": facts()}}}
    assert not compiled.differences(gate({}, a=facts()), committed, ["layer_norm"])
    assert not compiled.differences(gate({}, a=facts()), committed, None)  # no nvcc here, its kernels are not held against it
    assert compiled.differences(gate({"nvcc": "1"}, a=facts()), committed, None)


def test_gate_file_has_a_line_per_kernel_and_architecture():
    before = gate({"triton": "1"}, b=facts(mma={"HMMA": 4}), a=facts())
    text = compiled.as_text(before["versions"], before["kernels"])
    assert json.loads(text) == before
    assert sum('"sm_80"' in line for line in text.splitlines()) == 2
    assert text.index("layer_norm/a") < text.index("layer_norm/b")
