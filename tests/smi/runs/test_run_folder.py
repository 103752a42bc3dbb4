"""Runs that go on: after a stop between batches or within one, with more images, with several processes; the bits are those of an undisturbed run."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import smi
from smi.cli.main import run
from smi.errors import InputError, RunError
from smi.images.storage import MANIFEST, RUN, TENSORS
from smi.runs import checkpoint, folder
from smi.runs.lease import Leases
from smi.runs.verify import verify_run
from tests.conftest import small_vit

pytestmark = pytest.mark.fast

PRI = {"method": "pri", "division": 2, "iterations": 6, "batch_size": 2, "progress": False}


class Stopped(Exception):
    """As a kill: nothing of the run's is called any more."""


@pytest.fixture(scope="module")
def model():
    return small_vit()


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)


def stop_at(batch, iteration):
    def stop(at):
        if (at.batch, at.iteration) == (batch, iteration):
            raise Stopped

    return stop


@pytest.fixture
def always(monkeypatch):
    """A checkpoint before every update."""
    monkeypatch.setattr(checkpoint.Checkpoint, "due", lambda self: True)


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        *((PRI, at) for at in ((0, 0), (0, 1), (1, 3), (2, 5))),
        ({**PRI, "importance": "random"}, (0, 4)),
        ({**PRI, "method": "smi", "division": None, "dtype": "bfloat16"}, (1, 4)),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(model, tmp_path, always, settings, at):
    """Whatever iteration it stopped at, of whatever batch; and it takes no update again that a checkpoint holds."""
    settings = {name: value for name, value in settings.items() if value is not None} | {"num_images": 10 if settings["method"] == "pri" else 5}
    with pytest.raises(Stopped):
        smi.invert(model, output=tmp_path / "run", on_iteration=stop_at(*at), **settings)
    updates = []
    images = smi.invert(model, output=tmp_path / "run", on_iteration=lambda at: updates.append((at.batch, at.iteration)), **settings)
    assert updates[0] == at
    assert same(images, smi.invert(model, **settings))
    assert same(smi.SparseImages.load(tmp_path / "run"), images)


def test_snapshots_of_a_run_that_was_stopped_are_whole(model, tmp_path, always):
    from smi.inversion.snapshots import load_progress

    with pytest.raises(Stopped):
        smi.invert(model, output=tmp_path / "stopped", num_images=2, on_iteration=stop_at(0, 4), **PRI)
    kept = []
    for name in ("stopped", "whole"):
        images = smi.invert(model, output=tmp_path / name, num_images=2, **PRI)
        kept.append(load_progress(tmp_path / name, images.provenance["run"]))
    assert torch.equal(kept[0].pixels, kept[1].pixels)
    assert torch.equal(kept[0].losses, kept[1].losses)


def test_a_finished_run_is_not_made_again(model, tmp_path):
    first = smi.invert(model, output=tmp_path, num_images=4, **PRI)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.suffix == ".safetensors"}
    updates = []
    again = smi.invert(model, output=tmp_path, num_images=4, on_iteration=updates.append, **PRI)
    assert (same(first, again), updates) == (True, [])
    assert before == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.suffix == ".safetensors"}
    assert again.provenance == first.provenance


def user_loss(images, logits, labels):
    return images.square().mean()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed:"),
        ({"lr": 0.1}, "lr"),
        ({"labels": [1]}, "labels"),
        ({"batch_size": 3}, "batch_size"),
        ({"iterations": 7}, "iterations"),
        ({"division": 4}, "schedule"),
        ({"init": torch.zeros(4, 3, 16, 16)}, "init"),
        ({"augmentation": [(1, 0, False)] * 6}, "augmentation"),
        ({"importance": "random"}, "importance"),
        ({"losses": [user_loss]}, "losses"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean"),
        ({"update": "all"}, "update"),
        ({"num_images": 6}, "num_images"),
    ],
)
def test_other_settings_are_refused_by_name(model, tmp_path, begun, changes, named):
    files = sorted(path.name for path in begun.iterdir())
    with pytest.raises(InputError, match=f"holds a run with other .*{named}.*--force"):
        smi.invert(model, output=begun, **{**PRI, "num_images": 8, **changes})
    assert sorted(path.name for path in begun.iterdir()) == files


@pytest.fixture(scope="module")
def begun(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(Stopped):
        smi.invert(model, output=folder, num_images=8, on_iteration=stop_at(1, 3), **PRI)
    return folder


def test_other_weights_and_another_activation_are_refused(begun):
    with pytest.raises(InputError, match="other weights"):
        smi.invert(small_vit(seed=1), output=begun, num_images=8, **PRI)
    with pytest.raises(InputError, match="other architecture"):
        smi.invert(small_vit(act_layer="gelu_tanh"), output=begun, num_images=8, **PRI)


@pytest.mark.parametrize("setting", [{"losses": [*smi.default_losses(), user_loss]}, {"importance": lambda snapshot: snapshot.attention}])
def test_a_function_of_the_users_needs_a_label(model, tmp_path, setting):
    for label, then, message in ((None, None, "label"), ("a", "b", "other .*label"), ("a", "a", None)):
        folder = tmp_path / f"{label}{then}"
        with pytest.raises(Stopped):
            smi.invert(model, output=folder, num_images=8, on_iteration=stop_at(1, 3), label=label, **setting, **PRI)
        if message is None:
            assert len(smi.invert(model, output=folder, num_images=8, label=then, **setting, **PRI)) == 8
        else:
            with pytest.raises(InputError, match=message):
                smi.invert(model, output=folder, num_images=8, label=then, **setting, **PRI)


def test_a_run_of_which_nothing_was_made_binds_nobody(model, tmp_path):
    with pytest.raises(Stopped):
        smi.invert(model, output=tmp_path / "new", num_images=4, on_iteration=stop_at(0, 3), **PRI)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("first", "then"), [(4, 12), (6, 7), (5, 12), (3, 4)])
def test_more_images_of_the_same_run(model, tmp_path, first, then):
    """Whole batches stay as they are; a short last one, and one whose last trajectory was cut, are made again at full size."""
    smi.invert(model, output=tmp_path, num_images=first, **PRI)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("images-*-4.safetensors")}
    images = smi.invert(model, output=tmp_path, num_images=then, **PRI)
    assert same(images, smi.invert(model, num_images=then, **PRI))
    assert same(smi.SparseImages.load(tmp_path), images)
    assert whole.items() <= {path.name: path.read_bytes() for path in tmp_path.glob("images-*-4.safetensors")}.items()
    assert len(list(tmp_path.glob("images-*.safetensors"))) == -(-then // 4)
    assert images.provenance["num_images"] == then


def test_force_starts_anew_and_keeps_the_images_until_there_are_new_ones(model, tmp_path):
    earlier = smi.invert(model, output=tmp_path, num_images=4, **PRI)
    with pytest.raises(Stopped):
        smi.invert(model, output=tmp_path, num_images=4, seed=1, force=True, on_iteration=stop_at(0, 3), **PRI)
    assert same(smi.SparseImages.load(tmp_path), earlier)
    later = smi.invert(model, output=tmp_path, num_images=4, seed=1, force=True, **PRI)
    assert same(smi.SparseImages.load(tmp_path), later)
    assert not same(earlier, later)
    assert len(list(tmp_path.glob("images-*.safetensors"))) == 1


def test_images_that_were_saved_over_a_run_are_not_taken_for_its(model, tmp_path):
    images = smi.invert(model, output=tmp_path, num_images=4, **PRI)
    images[:1].save(tmp_path, force=True)
    with pytest.raises(InputError, match="is not empty"):
        smi.invert(model, output=tmp_path, num_images=4, **PRI)
    assert len(smi.SparseImages.load(tmp_path)) == 1


def test_an_index_that_lacks_a_shard_is_mended(model, tmp_path):
    """A process that was killed between a shard and the index."""
    images = smi.invert(model, output=tmp_path, num_images=8, **PRI)
    index = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**index, "parts": index["parts"][:1], "images": 4, "complete": False}))
    smi.invert(model, output=tmp_path, num_images=8, **PRI)
    assert same(smi.SparseImages.load(tmp_path), images)
    assert json.loads((tmp_path / MANIFEST).read_text()) == index


@pytest.mark.parametrize("content", [b"", b"damaged", None])
def test_a_checkpoint_that_does_not_fit_is_passed_over(model, tmp_path, always, content):
    with pytest.raises(Stopped):
        smi.invert(model, output=tmp_path, num_images=4, on_iteration=stop_at(0, 4), **PRI)
    path = next(tmp_path.glob("checkpoint-*"))
    if content is None:
        from safetensors.torch import load_file, save_file

        held = load_file(path)
        save_file({**held, "index": held["index"] + 16}, path, metadata={"format": checkpoint.FORMAT})
    else:
        path.write_bytes(content)
    assert same(smi.invert(model, output=tmp_path, num_images=4, **PRI), smi.invert(model, num_images=4, **PRI))


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}', '{"format": "smi.run/1"}'])
def test_a_run_file_of_others_or_damaged(model, tmp_path, content):
    (tmp_path / RUN).write_text(content)
    with pytest.raises(InputError, match=r"run\.json"):
        smi.invert(model, output=tmp_path, num_images=4, **PRI)
    assert (tmp_path / RUN).read_text() == content


def test_a_run_that_another_replaced_stops(model, tmp_path):
    def replace(at):
        if at.batch == 1:
            smi.invert(model, output=tmp_path, num_images=4, seed=1, force=True, **PRI)

    with pytest.raises(RunError, match="another run was begun"):
        smi.invert(model, output=tmp_path, num_images=8, on_iteration=replace, **PRI)
    assert same(smi.SparseImages.load(tmp_path), smi.invert(model, num_images=4, seed=1, **PRI))


def test_checkpoints_take_two_percent_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    monkeypatch.setattr(checkpoint, "replace_file", lambda *_, **__: now.__setitem__(0, now[0] + 3))
    held, spent = checkpoint.Checkpoint(tmp_path / "c", every=60), 0
    while now[0] < 10_000:
        now[0] += 1
        if held.due():
            held.save({})
            spent += 3
    assert 0.015 < spent / now[0] <= 0.0203  # the first comes after 60 s, before its cost is known
    assert not checkpoint.Checkpoint(tmp_path / "c", every=0).due()


def test_verify_finds_what_was_changed_and_the_run_makes_it_again(model, tmp_path, capsys):
    images = smi.invert(model, output=tmp_path, num_images=12, **PRI)
    index = json.loads((tmp_path / MANIFEST).read_text())
    changed, lost, whole = (tmp_path / part["file"] for part in index["parts"])
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1  # a bit of a pixel: the file still loads
    changed.write_bytes(content)
    lost.unlink()
    assert run(["verify-run", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "1 shards are intact, 2 batches are still to be made" in told.out
    assert f"{changed.name}: its bytes are not those that were written" in told.err
    assert f"{lost.name}: it is not there" in told.err
    assert same(smi.SparseImages.load(tmp_path), images[8:])
    assert same(smi.invert(model, output=tmp_path, num_images=12, **PRI), images)
    (tmp_path / MANIFEST).write_text("{")
    assert verify_run(tmp_path).unnamed == sorted(part["file"] for part in index["parts"])
    assert same(smi.SparseImages.load(tmp_path), images)
    assert run(["verify-run", str(tmp_path)]) == 0


def test_verify_of_images_without_a_run(model, tmp_path):
    images = smi.invert(model, num_images=2, **PRI)
    images.save(tmp_path / "saved")
    found = verify_run(tmp_path / "saved")
    assert (found.sound, len(found.intact), found.missing) == (True, 1, None)
    next((tmp_path / "saved").glob("*.safetensors")).write_bytes(b"")
    assert not verify_run(tmp_path / "saved").sound
    with pytest.raises(InputError, match="holds no run"):
        verify_run(tmp_path / "saved")


BESIDE = """
import sys, time, torch, smi
from tests.conftest import small_vit
torch.set_num_threads(1)
smi.invert(small_vit(), output=sys.argv[1], num_images=24, **{PRI!r}, on_iteration=lambda at: time.sleep(0.01))
"""  # a fork of a process that has computed with threads may hang


def test_processes_share_a_folder(model, tmp_path):
    command = [sys.executable, "-c", BESIDE.replace("{PRI!r}", repr(PRI)), str(tmp_path / "run")]
    workers = [subprocess.Popen(command, cwd=Path(__file__).parents[3]) for _ in range(2)]
    made = []
    while not (tmp_path / "run" / RUN).exists() and any(worker.poll() is None for worker in workers):
        time.sleep(0.01)
    images = smi.invert(model, output=tmp_path / "run", num_images=24, on_batch=made.append, on_iteration=lambda at: time.sleep(0.01), **PRI)
    assert [worker.wait(300) for worker in workers] == [0, 0]
    assert len(made) < 6
    assert same(images, smi.invert(model, num_images=24, **PRI))
    assert same(smi.SparseImages.load(tmp_path / "run"), images)
    assert smi.SparseImages.load(tmp_path / "run").provenance["complete"]
    assert not list((tmp_path / "run").glob("*.lease"))


def test_a_batch_that_another_process_finishes_meanwhile_stays(model, tmp_path, monkeypatch):
    """Also between the listing of the batches and the removal of those that were made again."""
    write, placed = folder.write_index, {}

    def write_meanwhile(at, *args):
        write(at, *args)
        if not placed:
            first = next(at.glob("images-*-00000-4.safetensors"))
            last = at / first.name.replace("-00000-", "-00002-")  # with content of its own, which would not be made again
            placed[last] = Path(shutil.copy(first, last)).read_bytes()

    monkeypatch.setattr(folder, "write_index", write_meanwhile)
    smi.invert(model, output=tmp_path, num_images=12, **PRI)
    assert {path: path.read_bytes() for path in placed} == placed
    assert len(smi.SparseImages.load(tmp_path)) == 12


def test_a_lease_keeps_others_out_until_it_ends(tmp_path):
    mine, other = Leases(tmp_path, "run", 0.3), Leases(tmp_path, "run", 0.3)
    with mine.claim(0) as ours:
        with other.claim(0) as theirs, other.claim(1) as another:
            assert (ours, theirs, another) == (True, False, True)
        time.sleep(0.5)  # longer than a lease: it is kept alive
        with other.claim(0) as theirs:
            assert not theirs
    with other.claim(0) as theirs:
        assert theirs


@pytest.mark.parametrize("owner", [{"machine": "elsewhere", "owner": "x"}, None])
def test_what_a_dead_process_leased_is_taken_over(tmp_path, owner):
    """Of another machine, after the lease; of this one, at once. Clocks are not compared: the file may be of any time."""
    if owner is None:
        process = multiprocessing.get_context("fork").Process(target=_leave_a_lease, args=(tmp_path,))
        process.start()
        process.join()
    else:
        (tmp_path / "run-00000.lease").write_text(json.dumps(owner))
        os.utime(tmp_path / "run-00000.lease", (0, 2**33))
    leases = Leases(tmp_path, "run", 0.2)
    with leases.claim(0) as ours:
        assert ours is (owner is None)
    time.sleep(0.25)
    with leases.claim(0) as ours:
        assert ours


def _leave_a_lease(folder):
    with Leases(folder, "run").claim(0):
        os._exit(9)
