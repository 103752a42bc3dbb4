"""The tool that times tiles, without a GPU: kernels interpreted on small shapes, times made up."""

import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from bench.tune import run as tune
from bench.tune import slots as tune_slots
from smi.kernels import tuned, versions
from smi.kernels.attention import tiles

CPU = torch.device("cpu")
SMALL = {"BATCH": 1, "HEADS": 1, "IMAGE": 16, "PATCH": 4, "WIDTHS": (24, 48), "TOKENS": (5, 13, 40), "ROWS": (3, 7)}


@pytest.fixture
def small(monkeypatch):
    """The sizes of all slots, small."""
    for name, value in SMALL.items():
        monkeypatch.setattr(tune_slots, name, value)
    monkeypatch.setattr(tune_slots, "gemm_rows", lambda: (3, 7))
    monkeypatch.setattr(tune_slots, "ATTENTION", ((64, torch.bfloat16), (64, torch.float32)))
    monkeypatch.setattr(versions.load("patch_embed", "triton"), "LARGE_FROM", 1 * 5 * 48)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder of tables, and a GPU that has one."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tiles")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Imaginary 1")
    tuned.table.cache_clear()
    yield tmp_path / "tiles"
    tuned.table.cache_clear()


def slot_named(operation: str, name: str) -> tune_slots.Slot:
    return next(slot for slot in tune_slots.slots(CPU, [operation]) if slot.name == name)


def prefer(wanted: tuple, log: list | None = None):
    """A timer that runs everything once and finds a tile the slower the farther it is from `wanted`."""

    def timer(runs, device, rounds):
        for run in runs.values():
            run()
        if log is not None:
            log.append(list(runs))
        far = {tile: sum(abs(a.bit_length() - b.bit_length()) for a, b in zip(tile, wanted, strict=True)) for tile in runs}
        return {tile: [1e-6 * (1 + d)] * rounds for tile, d in far.items()}

    return timer


def test_every_slot_is_asked_for_and_its_built_in_tile_is_right(small):
    """Names of slots are those of the launchers; arguments are complete; the checks hold for what ships. All operations are covered."""
    every = tune_slots.slots(CPU)
    assert {slot.operation for slot in every} == {op for op in versions.OPERATIONS if versions.exists(op, "triton")}
    assert len({(slot.operation, slot.name) for slot in every}) == len(every)
    for slot in every:
        truths = [tune.truth_of(slot, args) for args in slot.arguments(CPU)]
        built_in = tune.built_in_tile(slot, truths[0].args)
        assert len(built_in) == len(slot.axes), slot
        tune.check(slot, built_in, truths)


def test_attention_has_a_slot_for_every_class_of_lengths():
    """In full size, of which nothing is computed: each entry of the tables that this architecture uses, and forward's open end by powers of two."""
    names = {slot.name for slot in tune_slots.slots(CPU, ["attention"])}
    assert {f"fwd-n{n}/d64/2" for n in (16, 32, 64, 128, 256, 512, 1024)} <= names
    assert {f"bwd-n{e.n}/d64/2" for e in tiles.BACKWARD[64, 2]} - {"bwd-n160/d64/2"} <= names
    assert {"bwd-queries/d64/2", "bwd-keys/d64/2", "fwd-n16/d64/4"} <= names
    assert tune_slots.typical(33, 64) == (47, 33, 64)
    assert tune_slots.typical(257, 512) == (512, 257)


def test_neighbours_are_a_step_away():
    axes = {"BM": (16, 32, 64), "BK": (), "warps": (2, 4)}
    assert set(tune.neighbours((32, 8, 4), axes)) == {(16, 8, 4), (16, 8, 2), (64, 8, 4), (32, 8, 2)}
    assert tune.neighbours((24, 8, 3), axes) == []  # off its axes: stays


def test_the_search_goes_downhill_and_times_nothing_twice(small):
    slot, log = slot_named("layer_norm", "fwd/d64/2"), []
    found = tune.search(slot, CPU, prefer((2, 1), log))
    assert (found.built_in, found.tile) == ((16, 4), (2, 1))
    assert found.seconds < found.built_in_seconds
    assert found.timed == len({tile for step in log for tile in step})
    steps = log[:-1]
    assert all(step[0] == min(before, key=lambda t: abs(t[0] - 2) + abs(t[1] - 1)) for before, step in zip(steps, steps[1:], strict=False))
    assert log[-1] == [(16, 4), (2, 1)]


def test_the_built_in_tile_stays_unless_another_is_clearly_faster(small):
    def noisy(runs, device, rounds):
        return {tile: [1.0, 1.1, 1.2] if tile == (16, 4) else [0.9, 1.05, 1.15] for tile in runs}

    found = tune.search(slot_named("layer_norm", "fwd/d64/2"), CPU, noisy)
    assert found.tile == found.built_in == (16, 4)
    assert found.row()["tile"] == [16, 4]


def test_wrong_and_spilling_and_failing_candidates_are_left_out(small, monkeypatch):
    """No timing on a red test: a kernel that is wrong in some tiles, spills in some, does not compile in some."""
    from contextlib import contextmanager

    kernel = versions.load("layer_norm", "triton")
    tile, forward = {}, kernel.forward

    def bad_forward(*args):
        y, *rest = forward(*args)
        tile["now"] = tuned._trial.get().numbers or (16, 4)
        if tile["now"][0] == 32:
            raise RuntimeError("out of resource: shared memory\nmore")
        return (y * 1.05 if tile["now"] == (8, 2) else y), *rest

    @contextmanager
    def launched(operation):
        kernels = []
        yield kernels
        kernels.append(SimpleNamespace(n_spills=8 if tile["now"] == (8, 4) else 0))  # known once the kernel is loaded

    monkeypatch.setattr(kernel, "forward", bad_forward)
    log = []
    found = tune.search(slot_named("layer_norm", "fwd/d64/2"), CPU, prefer((16, 4), log), launched)
    assert found.refused == Counter({"wrong": 1, "spills registers": 1, "RuntimeError: out of resource: shared memory": 2})
    assert {tile for step in log for tile in step} == {(16, 4), (16, 2), (16, 8)}


def test_compiled_kernels_are_recorded_as_they_are_launched(monkeypatch):
    import triton.runtime

    class Kernel:
        def run(self, x):
            return x + 1

    monkeypatch.setattr(triton.runtime, "JITFunction", Kernel)
    module = SimpleNamespace(kernel=Kernel(), other=3)
    monkeypatch.setattr(versions, "load", lambda operation, version: module)
    with tune.compiled_kernels("layer_norm") as found:
        assert module.kernel.run(1) == 2
    assert module.kernel.run(2) == 3
    assert found == [2]
    assert not vars(module.kernel)


def test_a_run_writes_a_table_that_launchers_consult_and_can_be_resumed(small, folder, monkeypatch, capsys):
    every = [slot_named("layer_norm", "fwd/d64/2"), slot_named("layer_norm", "bwd/d64/2"), slot_named("image_step", "tv_norms_bwd/all")]
    assert tune.tune(CPU, "Imaginary 1", every[:1], timer=prefer((4, 2))) == []
    path = folder / "imaginary-1.json"
    assert json.loads(path.read_text())["operations"]["layer_norm"]["fwd/d64/2"]["tile"] == [4, 2]
    searched = []
    monkeypatch.setattr(tune, "search", lambda slot, *rest: searched.append(slot.name) or tune.Found((1, 2), (1, 2), 1, 1, 1, Counter()))
    tune.tune(CPU, "Imaginary 1", every)
    assert searched == ["bwd/d64/2", "tv_norms_bwd/all"]  # the first was finished
    assert set(json.loads(path.read_text())["operations"]) == {"layer_norm", "image_step"}
    assert tuned.tile("layer_norm", "fwd/d64/2", (16, 4), torch.device("cuda", 0)) == (4, 2)
    assert tuned.tile("layer_norm", "fwd/d128/2", (16, 4), torch.device("cuda", 0)) == (16, 4)
    assert tuned.tile("layer_norm", "fwd/d64/2", (16, 4), CPU) == (16, 4)
    named = tuned.tile("layer_norm", "fwd/d64/2", tune.Truth(0, 0, 0)[:2], torch.device("cuda", 0))
    assert named == (4, 2)
    searched.clear()
    monkeypatch.setattr(tune, "source_of", lambda operation: "changed")
    tune.tune(CPU, "Imaginary 1", every[:1])
    tune.tune(CPU, "Imaginary 1", every[:1], again=True)
    assert searched == ["fwd/d64/2"] * 2  # other kernels, then on request
    assert "layer_norm fwd/d64/2: (16, 4) -> (4, 2)" in capsys.readouterr().out


def test_a_slot_that_fails_does_not_cost_the_others(small, folder, capsys):
    slots = [slot_named("layer_norm", "fwd/d64/2"), slot_named("layer_norm", "bwd/d64/2")]
    broken = tune_slots.Slot("layer_norm", "fwd/d999/2", "forward", slots[0].arguments, slots[0].axes)
    failed = tune.tune(CPU, "Imaginary 1", [broken, slots[1]], timer=prefer((16, 4)))
    assert failed == ["layer_norm fwd/d999/2: LookupError: layer_norm does not ask for a tile fwd/d999/2"]
    assert list(json.loads((folder / "imaginary-1.json").read_text())["operations"]["layer_norm"]) == ["bwd/d64/2"]


def test_a_tile_keeps_its_type_and_is_read_once(folder, monkeypatch):
    folder.mkdir()
    rows = {"attention": {"fwd-n64/d64/2": {"tile": [32, 64, 0, 2, 1]}}}
    (folder / "imaginary-1.json").write_text(json.dumps({"operations": rows}))
    there = SimpleNamespace(dtype=torch.bfloat16, itemsize=2, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert tiles.forward(47, 64, there) == tiles.Tile(32, 64, 0, 2, 1)
    monkeypatch.setattr(tuned, "read", None)  # not read again
    assert tiles.forward(40, 64, there).BT == 32
    assert tiles.forward(100, 64, there) == tiles.FORWARD[64, 2][-1].tile


def test_committed_tables_name_slots_that_exist():
    """A table that no launcher asks for, or with tiles of another length, is out of date."""
    for path in tuned.FOLDER.glob("*.json"):
        for operation, slots in tuned.read(path).items():
            known = {slot.name: len(slot.axes) for slot in tune_slots.slots(CPU, [operation])}
            for name, row in slots.items():
                assert len(row["tile"]) == len(row["built_in"]), f"{path.name} {operation} {name}"
                assert name.startswith("bwd-n") or known[name] == len(row["tile"]), f"{path.name} {operation} {name}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(capsys):
    assert tune.main(["--only", "attention"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_rows_are_those_of_the_published_runs():
    """Of every bin that a launcher of those runs asks for: batch 128 in SMI's stages, 18 in PRI's, one token an image in the last block."""
    rows = tune_slots.gemm_rows()
    assert {tune_slots.bin_of(r) for r in rows} == {32768, 16384, 8192, 4096, 2048, 1024, 128, 32}
    assert len(rows) == 8
    assert {128 * 197, 128 * 47} <= set(rows)
    assert all(r % 128 == 0 or r % 18 == 0 for r in rows)


def test_slots_are_chosen_by_name(small):
    every = tune_slots.slots(CPU, ["linear_gelu", "linear_residual"])
    found = tune_slots.chosen(every, ["linear_gelu/fwd/*/m4/2", "linear_residual/bwd_gelu/*"])
    assert {slot.operation for slot in found} == {"linear_gelu", "linear_residual"}
    assert 0 < len(found) < len(every)
    assert tune_slots.chosen(every, None) == every
    with pytest.raises(ValueError, match="no slot is called linear_gelu/forward"):
        tune_slots.chosen(every, ["linear_gelu/forward"])


def test_candidates_are_compiled_before_any_is_timed(small, folder):
    """First all slots in their built-in tiles; then, at every step of a search, all candidates before one of them is timed."""
    every, compiled = [slot_named("layer_norm", "fwd/d64/2"), slot_named("layer_norm", "bwd/d64/2")], []

    def timer(runs, device, rounds):
        assert compiled[0] == (every[0].name, None)
        assert compiled[1] == (every[1].name, None)
        assert set(runs) <= {tile for _, tile in compiled} | {(16, 4)}
        return prefer((4, 2))(runs, device, rounds)

    def compiler(candidates):
        compiled.extend((slot.name, tile) for slot, tile in candidates)

    assert tune.tune(CPU, "Imaginary 1", every, timer=timer, compiler=compiler) == []
    assert len(compiled) > 8


def test_tables_go_to_a_folder_of_choice_and_a_slot_without_time_is_named(small, folder, tmp_path):
    every = [slot_named("layer_norm", "fwd/d64/2")]
    assert tune.tune(CPU, "Imaginary 1", every, timer=prefer((4, 2)), folder=tmp_path / "out", seconds=1.0) == ["layer_norm fwd/d64/2: no time left"]
    assert tune.tune(CPU, "Imaginary 1", every, timer=prefer((4, 2)), folder=tmp_path / "out") == []
    assert (tmp_path / "out/imaginary-1.json").exists()
    assert not folder.exists()


def test_a_process_that_sees_no_gpu_compiles_a_slot(tmp_path):
    """The kernel of a slot is in Triton's cache afterwards, for the architecture that was named."""
    pytest.importorskip("triton")
    code = "from bench.tune import compile; compile.compile_one((90, 'layer_norm', 'fwd/d1024/2', (8, 4)))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    (made,) = tmp_path.rglob("layer_norm_fwd.json")
    about = json.loads(made.read_text())
    assert (about["target"]["arch"], about["num_warps"]) == (90, 4)


TILES = '{"operations": {"layer_norm": {"fwd/d64/2": %s}}}'
DAMAGED = [
    "",
    "[]",
    "[" * 100_000,
    '{"operations": []}',
    TILES % "{}",
    *(TILES % f'{{"tile": {tile}}}' for tile in ("3", '["x", 2]', "[1e999, 2]", "[-1, 2]")),
]


@pytest.mark.parametrize("table", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_table_is_said_and_passed_over(table, folder, capsys):
    folder.mkdir()
    (folder / "imaginary-1.json").write_text(table)
    assert tuned.tile("layer_norm", "fwd/d64/2", (16, 4), torch.device("cuda", 0)) == (16, 4)
    assert "built-in tiles are used" in capsys.readouterr().err


def test_a_tile_of_other_numbers_is_not_used(folder):
    folder.mkdir()
    (folder / "imaginary-1.json").write_text(TILES % '{"tile": [4, 2, 1]}')
    assert tuned.tile("layer_norm", "fwd/d64/2", (16, 4), torch.device("cuda", 0)) == (16, 4)
