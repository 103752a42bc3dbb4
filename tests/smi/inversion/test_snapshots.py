"""Snapshots of a run's first trajectory: when they are taken, what they hold, and that they belong to their run."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import smi
from smi.errors import InputError
from smi.images.patches import to_patches
from smi.inversion.schedules import make_schedule
from smi.inversion.snapshots import FIELDS, FILE, load_progress, moments

pytestmark = pytest.mark.fast

QUICK = {"num_images": 4, "iterations": 9, "batch_size": 1, "progress": False}


@pytest.mark.parametrize(
    ("method", "options", "count", "expected"),
    [
        ("dense", {}, 3, [0, 49, 99]),
        ("dense", {}, 1, [99]),
        ("dense", {}, 0, []),
        ("pri", {"division": 4}, 5, [0, 24, 49, 74, 99]),  # the first, the end of each stage, the last
        ("pri", {"division": 4}, 6, [0, 24, 36, 49, 74, 99]),  # the longest gap halved
        ("pri", {"division": 16}, 4, [0, 29, 65, 99]),  # more events than snapshots: some of them
    ],
)
def test_moments(method, options, count, expected):
    assert moments(make_schedule(method, 16, 100, **options), count) == expected


def test_no_more_moments_than_iterations():
    assert moments(make_schedule("dense", 16, 3), 8) == [0, 1, 2]
    assert moments(make_schedule("gaussian", 16, 0), 8) == []


def test_what_left_is_in_the_snapshot_of_its_stage(vit, tmp_path):
    images = smi.invert(vit, method="pri", division=2, output=tmp_path, **QUICK)
    progress = load_progress(tmp_path, images.provenance["run"])
    first = images[images.trajectory == 0]
    assert progress.label == int(first.labels[0])
    for stage in (0, 1):
        end = progress.iterations.index((3, 8)[stage])  # the last iteration of the stage
        cells = to_patches(progress.pixels[end : end + 1], vit.patch_embed.patch_size[0])
        torch.testing.assert_close(cells[0, first.index[stage]], first.patches[stage], rtol=0, atol=0)
    active = {iteration: len(cells) for iteration, cells in zip(progress.iterations, progress.active, strict=True)}
    assert (active[0], active[3], active[8]) == (16, 16, 8)
    assert progress.active[-1].tolist() == first.index[1].tolist()


def test_losses_are_those_that_were_told(vit, tmp_path):
    told = []
    smi.invert(vit, method="dense", output=tmp_path, on_iteration=lambda at: told.append(at.loss) if at.batch == 0 else None, **QUICK)
    images = smi.SparseImages.load(tmp_path)
    progress = load_progress(tmp_path, images.provenance["run"])
    assert progress.loss_iterations == list(range(9))
    assert progress.losses.tolist() == pytest.approx(told)


def test_images_are_the_same_without_them(vit, tmp_path):
    kept = smi.invert(vit, method="smi", output=tmp_path / "kept", **QUICK)
    none = smi.invert(vit, method="smi", output=tmp_path / "none", snapshots=0, **QUICK)
    assert torch.equal(kept.patches, none.patches)
    assert not (tmp_path / "none" / FILE).exists()
    assert load_progress(tmp_path / "none", none.provenance["run"]) is None


def test_those_of_an_earlier_run_are_not_taken_for_this_one(vit, tmp_path):
    earlier = smi.invert(vit, method="dense", output=tmp_path, **QUICK)
    later = smi.invert(vit, method="dense", output=tmp_path, force=True, snapshots=0, **QUICK)
    assert load_progress(tmp_path, earlier.provenance["run"]) is not None
    assert load_progress(tmp_path, later.provenance["run"]) is None


def test_a_damaged_file_is_named(vit, tmp_path):
    images = smi.invert(vit, method="dense", output=tmp_path, **QUICK)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:200])
    with pytest.raises(InputError, match="progress.safetensors is damaged"):
        load_progress(tmp_path, images.provenance["run"])


@pytest.mark.parametrize(
    "change",
    [
        {"pixels": torch.zeros(3)},
        {"index": torch.full((8, 16), 99)},
        {"index": torch.zeros(8, 16)},
        {"losses": torch.zeros(9, dtype=torch.int64)},
        {"loss_iterations": torch.zeros(2, dtype=torch.int64)},
        {"label": torch.zeros(2, dtype=torch.int64)},
        {"label": torch.tensor([True])},
    ],
)
def test_tensors_that_do_not_fit_are_refused(vit, tmp_path, change):
    """The picture of the progress would fail on them."""
    run = smi.invert(vit, method="dense", output=tmp_path, **QUICK).provenance["run"]
    with safe_open(tmp_path / FILE, "pt") as file:
        held, about = {name: file.get_tensor(name) for name in FIELDS}, file.metadata()
    save_file(held | change, tmp_path / FILE, metadata=about)
    with pytest.raises(InputError, match=f"progress.safetensors is damaged .*{next(iter(change))}"):
        load_progress(tmp_path, run)


@pytest.mark.parametrize("count", [-1, 1.5, True])
def test_counts_that_make_no_sense(vit, tmp_path, count):
    with pytest.raises(InputError, match="snapshots must be a whole number"):
        smi.invert(vit, method="dense", output=tmp_path / "out", snapshots=count, **QUICK)
    assert not (tmp_path / "out").exists()


def test_nothing_is_kept_of_noise(vit, tmp_path):
    smi.invert(vit, method="gaussian", num_images=2, output=tmp_path, progress=False)
    assert not (tmp_path / FILE).exists()
