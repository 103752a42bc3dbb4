"""The result: indexing, concatenation, dense pictures, files."""

import io
import json
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import smi
from smi.errors import InputError, RunError
from smi.files import replace_file
from smi.images.export import export_parquet, export_png, export_webdataset, to_picture
from smi.images.sparse_images import SparseImages
from smi.images.storage import MANIFEST, Writer

pytestmark = pytest.mark.fast


def make(m=4, n=3, channels=2, p=2, grid=(2, 3), seed=0, **provenance):
    generator = torch.Generator().manual_seed(seed)
    cells = grid[0] * grid[1]
    return SparseImages(
        patches=torch.randn(m, n, channels, p, p, generator=generator),
        index=torch.stack([torch.randperm(cells, generator=generator)[:n].sort().values for _ in range(m)])
        if m
        else torch.empty(0, n, dtype=torch.int64),
        labels=torch.arange(m),
        trajectory=torch.arange(m) // 2,
        stage=torch.arange(m) % 2,
        grid=grid,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        provenance=provenance,
    )


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("patches", "index", "labels", "trajectory", "stage")) and a.grid == b.grid


def test_indexing():
    images = make()
    assert len(images) == 4
    assert same(images[1], images[1:2])
    assert same(images[[0, 2]], images[torch.tensor([True, False, True, False])])
    assert images[-1].labels.tolist() == [3]
    with pytest.raises(IndexError):
        images[4]
    assert [int(image.labels) for image in images] == [0, 1, 2, 3]


def test_to_dense_puts_each_patch_in_its_cell():
    images = make()
    dense = images.to_dense([7.0, 8.0])
    assert dense.shape == (4, 2, 4, 6)
    for i in range(4):
        for cell in range(6):
            row, column = divmod(cell, 3)
            there = dense[i, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            if cell in images.index[i]:
                assert torch.equal(there, images.patches[i, images.index[i].tolist().index(cell)])
            else:
                assert torch.equal(there, torch.tensor([7.0, 8.0]).view(2, 1, 1).expand(2, 2, 2))
    assert (images.to_dense() == 0).sum() == 4 * 3 * 2 * 4
    with pytest.raises(InputError, match="fill must be a number or 2 numbers"):
        images.to_dense([1.0])


def test_pixels_to_look_at():
    pixels = make().to_pixels()
    assert pixels.min() >= 0
    assert pixels.max() <= 1


def test_concatenation_renumbers_trajectories_of_other_runs():
    a, b = make(seed=1, run=1), make(seed=2, run=2)
    both = a + b
    assert both.trajectory.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert both.provenance == {"concatenated": [{"run": 1}, {"run": 2}]}
    one_run = a[:2] + a[2:]
    assert same(one_run, a)
    assert one_run.provenance == {"run": 1}
    with pytest.raises(InputError, match="different patch shape"):
        a + make(n=2)
    with pytest.raises(InputError, match="different grid"):
        a + make(grid=(3, 2))
    with pytest.raises(InputError, match="no images to concatenate"):
        SparseImages.cat([])


def test_dataset_loads_in_batches():
    images = make()
    patches, index, labels = next(iter(torch.utils.data.DataLoader(images.dataset(), batch_size=4)))
    assert torch.equal(patches, images.patches)
    assert torch.equal(index, images.index)
    assert torch.equal(labels, images.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patches": torch.zeros(4, 3, 2, 2)}, "patches must be"),
        ({"index": torch.zeros(4, 2)}, "index must be"),
        ({"index": torch.full((4, 3), 6)}, "cells of the 2x3 grid"),
        ({"std": (0.5, 5e-324)}, "std must be a positive number from 1e-6"),
        ({"mean": (0.5, 1e300)}, "mean must be a number from -1e6"),
        ({"grid": (2, 2049)}, "at most 4096 pixels along a side"),
        ({"stage": torch.tensor([0, 1, 2, 0])}, "stage must be below 2"),
        ({"stage": torch.full((4,), 2**62)}, "stage must be below 2"),
        ({"trajectory": torch.full((4,), 2**31)}, "trajectory below 2"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    from dataclasses import replace

    with pytest.raises(InputError, match=message):
        replace(make(), **change)


def test_save_and_load(tmp_path):
    images = make(seed=1, method="pri")
    images.save(tmp_path / "out")
    loaded = SparseImages.load(tmp_path / "out")
    assert same(images, loaded)
    assert loaded.provenance == {"method": "pri", "complete": True}
    assert (loaded.mean, loaded.std) == (images.mean, images.std)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_nothing_is_overwritten_without_force(tmp_path):
    make(seed=1).save(tmp_path)
    with pytest.raises(InputError, match="is not empty"):
        make(seed=2).save(tmp_path)
    assert same(SparseImages.load(tmp_path), make(seed=1))
    (tmp_path / "notes.txt").write_text("mine")
    make(seed=2).save(tmp_path, force=True)
    assert same(SparseImages.load(tmp_path), make(seed=2))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_replacing_keeps_the_old_images_until_the_first_new_batch(tmp_path):
    make(seed=1).save(tmp_path)
    writer = Writer(tmp_path, force=True)
    assert same(SparseImages.load(tmp_path), make(seed=1))
    make(seed=2).add_to(writer)
    assert same(SparseImages.load(tmp_path), make(seed=2))
    assert SparseImages.load(tmp_path).provenance["complete"] is False


@pytest.mark.parametrize("folder", ["/proc/smi", "/dev/null/smi"])
def test_a_folder_that_cannot_be_written(folder):
    with pytest.raises(InputError, match="cannot be written|is a file"):
        make().save(folder)


def test_a_disk_that_fails_keeps_what_was_written(tmp_path):
    writer = Writer(tmp_path)
    make(seed=1).add_to(writer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, limits[1]))  # a real failure to write, as on a full disk
    try:
        with pytest.raises(RunError, match="writing to .* failed .*4 images are kept"):
            make(m=4, p=64).add_to(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert same(SparseImages.load(tmp_path), make(seed=1))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_result_without_images_leaves_nothing(tmp_path):
    Writer(tmp_path / "new").close(complete=False)
    assert not (tmp_path / "new").exists()
    Writer(tmp_path).close(complete=False)
    assert tmp_path.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no sparse images"), ("{", "cannot be read as JSON"), ("[]", "not of format"), ('{"format": "other"}', "not of format")],
)
def test_folders_that_are_not_ours(tmp_path, content, message):
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(InputError, match=message):
        SparseImages.load(tmp_path)


def test_a_damaged_folder(tmp_path):
    make().save(tmp_path)
    part = next(tmp_path.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(InputError, match="is damaged"):
        SparseImages.load(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["parts"][0]["file"] = "../elsewhere.safetensors"
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="outside its folder"):
        SparseImages.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"parts": []},
        {"parts": [1]},
        {"parts": [{"file": 5}]},
        {"grid": [8]},
        {"grid": None},
        {"grid": [10**6, 10**6]},
        {"mean": "x"},
        {"std": [1]},
        {"provenance": None},
        {"complete": ...},
    ],
)
def test_a_damaged_manifest(change, tmp_path):
    make().save(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest = {key: value for key, value in {**manifest, **change}.items() if value is not ...}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is damaged"):
        SparseImages.load(tmp_path)
    make(seed=2).save(tmp_path, force=True)
    assert same(SparseImages.load(tmp_path), make(seed=2))


def test_png_export(tmp_path):
    from PIL import Image

    images = make(channels=3)
    paths = export_png(images, tmp_path / "png")
    assert len(paths) == 4
    picture = torch.tensor(list(Image.open(paths[2]).convert("RGB").tobytes())).view(4, 6, 3)
    expected = images[2].to_pixels()[0].mul(255).round().permute(1, 2, 0).int()
    assert torch.equal(picture.int(), expected)
    index = json.loads((tmp_path / "png" / "index.json").read_text())["retained_patches"]
    assert index[paths[2].name] == images.index[2].tolist()
    with pytest.raises(InputError, match="is not empty"):
        export_png(images, tmp_path / "png")
    assert len(export_png(make(channels=1), tmp_path / "grey")) == 4
    (tmp_path / "png" / "mine.png").write_text("keep")
    export_png(images[:2], tmp_path / "png", force=True)
    assert sorted(path.name for path in (tmp_path / "png").glob("*.png")) == sorted([*(path.name for path in paths[:2]), "mine.png"])


def test_webdataset_export(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    images = make()
    paths = export_webdataset(images, tmp_path / "shards", shard_images=3)
    assert [path.name for path in paths] == ["images-000000.tar", "images-000001.tar"]
    samples = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False).decode())
    assert len(samples) == 4
    for i, sample in enumerate(samples):
        assert torch.equal(torch.as_tensor(sample["patches.npy"]), images.patches[i])
        assert torch.equal(torch.as_tensor(sample["index.npy"]), images.index[i])
        assert sample["cls"] == i
        assert sample["json"]["grid"] == [2, 3]


def test_parquet_export(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    images = make()
    paths = export_parquet(images, tmp_path / "shards", shard_images=3)
    assert [path.name for path in paths] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    tables = [parquet.read_table(path) for path in paths]
    rows = [row for table in tables for row in table.to_pylist()]
    for row, pixels in zip(rows, images.to_pixels(), strict=True):
        assert np.array_equal(Image.open(io.BytesIO(row["image"]["bytes"])), to_picture(pixels))
    for name, held in (("label", images.labels), ("trajectory", images.trajectory), ("stage", images.stage), ("retained_patches", images.index)):
        assert [row[name] for row in rows] == held.tolist()
    features = json.loads(tables[0].schema.metadata[b"huggingface"])["info"]["features"]
    assert features.keys() == rows[0].keys()
    assert features["image"] == {"_type": "Image"}
    assert len(export_parquet(images, tmp_path / "shards", force=True)) == len(list(tmp_path.glob("shards/*.parquet"))) == 1


@pytest.mark.parametrize(
    ("export", "mine"),
    [
        (export_png, "000001_label9_trajectory0_stage0.png"),
        (export_png, "000099_label1_trajectory2_stage3.png"),
        (export_parquet, "train-00000-of-00001.parquet"),
        (export_webdataset, "images-000000.tar"),
        (export_webdataset, "images-000042.tar"),
        (export_png, "index.json"),
        (export_webdataset, "index.json"),
    ],
)
def test_an_export_replaces_only_an_exports_files(export, mine, tmp_path):
    """Files of such names and no index, and an index of something else, are the user's; what the index names is replaced, whatever was killed."""
    if export is not export_png:
        pytest.importorskip("webdataset" if export is export_webdataset else "pyarrow")
    (tmp_path / mine).write_text("[1]")
    with pytest.raises(InputError, match="choose another folder"):
        export(make(), tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == [mine]
    (tmp_path / mine).unlink()
    (tmp_path / "notes.txt").write_text("mine")
    export(make(), tmp_path, force=True)
    kept = export(make()[:1], tmp_path, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["index.json", "notes.txt", *(path.name for path in kept)])


def test_a_killed_export_can_be_made_again(tmp_path, monkeypatch):
    export_png(make(), tmp_path)

    def full(path, write):
        if path.name.startswith("000002"):
            raise KeyboardInterrupt
        replace_file(path, write)

    with monkeypatch.context() as patched:
        patched.setattr("smi.images.export.replace_file", full)
        with pytest.raises(KeyboardInterrupt):
            export_png(replace(make(), labels=torch.full((4,), 7)), tmp_path, force=True)
    kept = export_png(make(), tmp_path, force=True)
    assert sorted(tmp_path.glob("*.png")) == sorted(kept)


@pytest.mark.parametrize("content", ["{}", "[]", "nothing", '{"format": "of another program", "parts": [{"file": "notes.txt"}]}'])
def test_images_replace_no_manifest_of_others(content, tmp_path):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(InputError, match=r"images\.json"):
        make().save(tmp_path, force=True)
    assert (tmp_path / MANIFEST).read_text() == content


def test_images_remove_only_parts(tmp_path):
    """A manifest that names other files, also outside its folder, removes none of them."""
    folder = make().save(tmp_path / "images")
    mine = [folder / "notes.txt", tmp_path / "notes.txt", folder / "images-mine.safetensors"]
    for path in mine:
        path.write_text("mine")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["parts"] += [{"file": name} for name in ("notes.txt", "../notes.txt", str(mine[1]), "images-mine.safetensors", "..", "", 5)]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    make(seed=1).save(folder, force=True)
    assert all(path.read_text() == "mine" for path in mine)
    assert len(list(folder.glob("images-*-*.safetensors"))) == 1


INDICES = {
    "a NumPy mask": np.array([True, False, True, False]),
    "a list of truth values": [True, False, True, False],
    "a tensor mask": torch.tensor([True, False, True, False]),
    "a NumPy index": np.array([0, 2]),
    "negative": [-4, -2],
    "bytes": np.array([0, 2], dtype=np.uint8),
    "a tensor of int32": torch.tensor([0, 2], dtype=torch.int32),
    "a range": range(0, 4, 2),
    "a slice": slice(None, None, 2),
    "a slice of NumPy integers": slice(np.int64(0), np.int64(3), np.int64(2)),
    "scalars": [np.int64(0), torch.tensor(2)],
    "a tuple": (0, 2),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_images_take_what_a_tensor_takes(index):
    assert same(make()[index], SparseImages.cat([make()[0], make()[2]]))


def test_one_image_none_and_backwards():
    images = make()
    assert all(same(images[i], images[3:]) for i in (3, -1, np.int64(-1), torch.tensor(3), np.array(3), np.uint8(3)))
    for none in ([], np.array([]), torch.tensor([], dtype=torch.int64), slice(2, 2), range(0), [False] * 4, np.zeros(4, dtype=bool)):
        assert len(images[none]) == 0
    assert same(images[::-1], images[[3, 2, 1, 0]])
    assert same(images[...], images)
    assert len(list(images)) == 4
    assert len(make(m=0)[np.array([], dtype=bool)]) == 0
    for wrong in (
        4,
        -5,
        np.array([], dtype=bool),
        [0, 4],
        [0.5],
        "0",
        None,
        True,
        [True],
        np.ones((2, 2), dtype=bool),
        torch.tensor([[0, 1]]),
        {0: 1},
        1.0,
    ):
        with pytest.raises(IndexError, match="image"):
            images[wrong]


def test_forward_sparse_uses_retained_tokens_only(vit):
    images = make(m=2, n=5, channels=3, p=4, grid=(4, 4))
    expected = []
    for patches, cells in zip(images.patches, images.index, strict=True):
        tokens = torch.nn.functional.linear(patches.flatten(1), vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias)
        tokens = tokens + vit.pos_embed[0, 1 + cells]
        z = vit.blocks(torch.cat([vit.cls_token[0] + vit.pos_embed[0, :1], tokens])[None])
        expected.append(vit.head(vit.norm(z)[:, 0]))
    torch.testing.assert_close(smi.forward_sparse(vit, images), torch.cat(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(smi.forward_sparse(vit, (images.patches, images.index), batch_size=1), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_forward_sparse_trains_the_model(vit):
    images = make(m=2, n=5, channels=3, p=4, grid=(4, 4))
    smi.forward_sparse(vit, images).sum().backward()
    assert all(parameter.grad is not None for parameter in vit.parameters())
    with torch.no_grad():
        assert not smi.forward_sparse(vit, images).requires_grad


def test_forward_sparse_needs_no_statistics():
    from tests.conftest import small_vit

    model = small_vit(in_chans=1)
    model.pretrained_cfg = {}
    assert smi.forward_sparse(model, make(m=2, n=5, channels=1, p=4, grid=(4, 4))).shape == (2, 5)


def test_pictures_put_a_trajectory_in_each_column():
    from smi.report import rows_of

    pri = make(m=6)  # trajectories 0, 0, 1, 1, 2, 2
    rows = rows_of(pri[1:], columns=5)  # the first stage of trajectory 0 is missing
    assert [(name, images.trajectory.tolist()) for name, images in rows] == [("stage 1", [1, 2]), ("stage 2", [1, 2])]
    assert [len(images) for _, images in rows_of(pri[::2], columns=2)] == [2, 1]


def test_forward_sparse_refuses_images_of_another_model(vit):
    with pytest.raises(InputError, match="takes patches"):
        smi.forward_sparse(vit, make())
    with pytest.raises(InputError, match="has a 4x4 grid"):
        smi.forward_sparse(vit, make(channels=3, p=4, grid=(4, 5)))


def test_import_does_nothing_heavy():
    root = Path(__file__).parents[3]
    loaded = "{'triton', 'timm', 'matplotlib', 'sklearn', 'rich'} & set(sys.modules)"
    code = f"import sys, smi, torch; assert not {loaded}, {loaded}; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
