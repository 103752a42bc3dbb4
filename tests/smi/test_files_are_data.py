"""Files are data: nothing that we read runs code, reaches outside its folder, or takes more memory than the file explains."""

import io
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import smi
from smi.cli.main import run
from smi.distillation.run_folder import open_folder, read_result
from smi.distillation.training_state import load_state
from smi.errors import InputError
from smi.images.storage import MANIFEST
from smi.inversion.snapshots import load_progress
from smi.models.by_name import read_weights
from smi.models.folder import load_model_folder
from tests.conftest import fails, small_vit

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
EARLIER = Path(__file__).parents[1] / "data" / "0.1.0"  # folders that version 0.1.0 wrote
UNPICKLES = re.compile(
    r"\bpickle\b|\bdill\b|weights_only\s*=\s*False|export\.load\b|jit\.load\b|allow_pickle|np\.load\b|\bmarshal\b|\byaml\b|(?<![.\w])(eval|exec)\("
)


def test_no_source_unpickles():
    """All of smi, and kernels and csrc beneath it; torch.load is called with weights_only=True wherever it is called."""
    for file in (file for folder in ("smi", "kernels", "csrc") for file in (ROOT / folder).rglob("*.py")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert not UNPICKLES.search(line), f"{file}:{number}: {line}"
            assert "torch.load(" not in line or "weights_only=True" in line, f"{file}:{number}: {line}"


class Payload:
    """Unpickled it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def payload(tmp_path):
    """A pickled payload; that it never ran is checked at the end."""
    made = tmp_path / "made by a file"
    yield Payload(made)
    assert not made.exists()


def with_pt2(path, payload):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/sample_inputs/model.pt", pickle.dumps(payload))


WRITERS = {
    "torch.save": torch.save,
    "torch.save, old": lambda payload, path: torch.save({"state_dict": payload}, path, _use_new_zipfile_serialization=False),
    "pickle": lambda payload, path: path.write_bytes(pickle.dumps({"model": payload})),
    "pickle protocol 0": lambda payload, path: path.write_bytes(pickle.dumps(payload, 0)),
    "torch.export": lambda payload, path: with_pt2(path, payload),
    "as a key": lambda payload, path: torch.save({"model": {"head.weight": torch.ones(2, 2)}, "args": payload}, path),
    "a whole model": lambda payload, path: torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path),
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pt2", ".bin", ".safetensors", ".ckpt"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_checkpoint_runs_no_code(write, suffix, payload, tmp_path):
    write(payload, tmp_path / f"weights{suffix}")
    with pytest.raises(InputError, match="cannot be read as a checkpoint of plain tensors"):
        read_weights(tmp_path / f"weights{suffix}")


def test_a_checkpoint_that_is_larger_than_its_file_is_refused(tmp_path):
    """A compressed archive, and a tensor that repeats its few numbers."""
    torch.save({"head.weight": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    torch.save({"head.weight": torch.zeros(1).expand(1 << 40)}, tmp_path / "repeated.pth")
    for name in ("bomb", "repeated"):
        assert (tmp_path / f"{name}.pth").stat().st_size < 10_000
        with pytest.raises(InputError, match="takes more memory than the file holds"):
            read_weights(tmp_path / f"{name}.pth")
    assert len(read_weights(tmp_path / "plain.pth")["head.weight"]) == 1 << 20


def header(text: str | bytes, length: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file of this header."""
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADERS = {
    "empty": b"",
    "short": b"\x08",
    "a length beyond the file": header("{}", 1 << 62),
    "no JSON": header("\xff" * 8),
    "nested": header("[" * 100_000),
    "a shape beyond the data": header(json.dumps({"patches": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}), data=b"1234"),
    "an overflowing shape": header(json.dumps({"patches": {"dtype": "F32", "shape": [1 << 33, 1 << 33], "data_offsets": [0, 4]}}), data=b"1234"),
    "offsets beyond the file": header(json.dumps({"patches": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 40]}}), data=b"1234"),
    "offsets backwards": header(json.dumps({"patches": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}), data=b"1234"),
    "an unknown dtype": header(json.dumps({"patches": {"dtype": "OBJ", "shape": [1], "data_offsets": [0, 4]}}), data=b"1234"),
    "a pickle": pickle.dumps({"patches": [1]}),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_hostile_headers(content, tmp_path):
    """In every safetensors file that is read: one sentence that names the file or its folder."""
    folder = copy_of("images", tmp_path)
    next(folder.glob("images-*.safetensors")).write_bytes(content)
    with pytest.raises(InputError, match="images is damaged"):
        smi.SparseImages.load(folder)
    (folder / "progress.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"progress\.safetensors is damaged"):
        load_progress(folder, "any")
    (copy_of("int8", tmp_path) / "int8.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="int8 is damaged"):
        smi.load_quantized(tmp_path / "int8")
    (copy_of("model", tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="model is damaged"):
        load_model_folder(tmp_path / "model")
    (copy_of("distilling", tmp_path) / "state.safetensors").write_bytes(content)
    vit = small_vit()
    with pytest.raises(InputError, match=r"state\.safetensors cannot be resumed from"):
        load_state(tmp_path / "distilling" / "state.safetensors", vit, torch.optim.SGD(vit.parameters()))
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        read_weights(tmp_path / "weights.safetensors")


def copy_of(name: str, tmp_path: Path) -> Path:
    """A folder that version 0.1.0 wrote, to be damaged."""
    import shutil

    return Path(shutil.copytree(EARLIER / name, tmp_path / name))


TEXTS = {
    "empty": b"",
    "nested": b"[" * 200_000,
    "nested objects": b'{"a":' * 200_000,
    "no UTF-8": b"\xff\xfe{}",
    "a long number": b"9" * 10_000,
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "of another format": b'{"format": "other/1"}',
    "a pickle": pickle.dumps({}),
}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_hostile_json(content, tmp_path):
    for kind, name, load in (
        ("images", MANIFEST, smi.SparseImages.load),
        ("int8", "quantized.json", smi.load_quantized),
        ("model", "model.json", load_model_folder),
        ("distilled", "result.json", lambda folder: open_folder(folder, force=False) and read_result(folder)),
    ):
        folder = copy_of(kind, tmp_path)
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=kind):
            load(folder)


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../outside.safetensors", "..", ".", "", "a/b.safetensors", "images.json", "images-00000000-00000.pt", "C:\\x"]
)
def test_images_name_no_file_outside(name, tmp_path):
    folder = copy_of("images", tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    manifest["parts"][0]["file"] = name
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is damaged"):
        smi.SparseImages.load(folder)


@pytest.mark.parametrize("kind", ["../int8", "/etc", "simulated.pt2", "int8.safetensors", None, ["int8"], {"a": 1}])
def test_a_quantised_model_names_no_file_at_all(kind, tmp_path):
    folder = copy_of("int8", tmp_path)
    manifest = json.loads((folder / "quantized.json").read_text())
    (folder / "quantized.json").write_text(json.dumps({**manifest, "kind": kind}))
    with pytest.raises(InputError, match=r"quantized\.json is not of format"):
        smi.load_quantized(folder)


def png(side: int) -> bytes:
    """A PNG whose header says that it has side x side pixels."""
    data = io.BytesIO()
    Image.new("L", (2, 2)).save(data, format="PNG")
    import zlib

    whole, sizes = data.getvalue(), struct.pack(">II", side, side)
    chunk = b"IHDR" + sizes + whole[24:29]
    return whole[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:]


PICTURES = {
    "empty": b"",
    "a bomb": png(1 << 20),
    "truncated": png(2)[:40],
    "a broken chunk": png(2)[:33] + b"\x7f\xff\xff\xffIDAT",
    "no picture": b"text",
    "a pickle": pickle.dumps(1),
}


@pytest.mark.parametrize("content", PICTURES.values(), ids=PICTURES)
def test_hostile_pictures(content, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png cannot be read as a picture"):
        smi.datasets.load(tmp_path, small_vit())
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"image": [content], "label": [0]}), tmp_path / "test.parquet")
    with pytest.raises(InputError, match=r"test\.parquet cannot be read as labelled images"):
        smi.datasets.load(tmp_path / "test.parquet", small_vit())


@pytest.mark.parametrize(
    "damage", [lambda b: b[:50], lambda b: b"", lambda b: b[:-8] + b"\xff\xff\xff\x7fPAR1", lambda b: b[: len(b) // 2] + b[len(b) // 2 + 9 :]]
)
def test_hostile_parquet(damage, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "test.parquet"
    parquet.write_table(pa.table({"image": [png(2)] * 3, "label": [0, 1, 2]}), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"test\.parquet cannot be read as labelled images"):
        smi.datasets.load(path, small_vit())


def test_cifar10_of_other_bytes_is_not_unpickled(payload, tmp_path):
    """torchvision's files are pickles, which are read only where their digests are the published ones."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(payload))
    with pytest.raises(InputError, match="holds no complete CIFAR-10"):
        smi.datasets.load(tmp_path, small_vit())


def test_by_command(payload, tmp_path, capsys):
    torch.save(payload, tmp_path / "w.pth")
    fails(capsys, ["invert", "-o", tmp_path / "o", "--model", "deit_tiny_patch16_224", "--checkpoint", tmp_path / "w.pth"], 2, "cannot be read")
    assert run(["show", str(EARLIER / "images"), "-o", str(tmp_path / "grid.png")]) == 0
