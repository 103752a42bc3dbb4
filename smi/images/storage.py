"""Sparse images on disk: numbered safetensors parts and one JSON file that names them.

A part is written under a temporary name, moved, and only then named in the JSON file, which is replaced in one move: whenever a run is killed, the
folder holds exactly the batches that were finished. Nothing of the caller's own in the folder is ever touched. The tensors of a part, with shapes and
dtypes, are in docs/api.md, "Files on disk".
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, RunError
from ..files import digest_of, output_folder, read_json, read_tensors, replace_file, write_json
from ..plain import for_json

MANIFEST = "images.json"
FORMAT = "smi.SparseImages/1"
RUN, RUN_FORMAT = "run.json", "smi.run/1"  # what a run was asked, beside its images (runs/folder.py)
PART = re.compile(r"images-[0-9a-f]{8}-[0-9]{5,}(-[0-9]+)?\.safetensors")
TENSORS = ("patches", "index", "labels", "trajectory", "stage")  # of every part, one row an image


class Writer:
    """Writes batches of sparse images to a folder as they are finished.

    Raises InputError when made if the folder is not empty and not `force`, holds an images.json that is not ours, or cannot be written.
    """

    def __init__(self, folder: str | Path, *, force: bool = False):
        self.folder = Path(folder)
        self.parts: list[dict] = []
        self.images = 0
        self.run = uuid.uuid4().hex[:8]  # part names of different runs never clash, so replacing a result is safe
        self.about: dict[str, Any] = {}
        self.provenance: Mapping[str, Any] = {}
        self.made = not self.folder.exists()
        output_folder(self.folder, force)
        self.replaced = parts_to_replace(self.folder)
        forget_run(self.folder)

    def add(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Write one finished batch; when this returns it is on disk. tensors: by the names in TENSORS. about: grid, mean and std, the same for every
        batch. Raises RunError where writing fails."""
        name = f"images-{self.run}-{len(self.parts):05d}.safetensors"
        count = len(tensors["labels"])
        try:
            replace_file(self.folder / name, lambda path: write_part(path, tensors, about), durable=True)
            self.parts.append({"file": name, "images": count, "sha256": digest_of(self.folder / name)})
            self.images += count
            self.about, self.provenance = dict(about), provenance
            self._commit(complete=False)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"writing to {self.folder} failed ({getattr(error, 'strerror', None) or error}): {self.images} images are kept there"
            ) from error
        for part in self.replaced:
            (self.folder / part).unlink(missing_ok=True)
        self.replaced = []

    def close(self, complete: bool) -> None:
        """End the result; a folder that was made for it and got no images is removed."""
        if self.parts:
            self._commit(complete=complete)
        elif self.made:
            self.folder.rmdir()

    def _commit(self, complete: bool) -> None:
        write_index(self.folder, complete, self.parts, self.about, self.provenance)


def write_part(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write one file of tensors, by the names in TENSORS; about: grid, mean and std."""
    held = {key: tensors[key].detach().cpu().clone(memory_format=torch.contiguous_format) for key in TENSORS}  # of one memory each
    save_file(held, path, metadata={"format": FORMAT, **{key: json.dumps(for_json(value)) for key, value in about.items()}})


def write_index(folder: Path, complete: bool, parts: Sequence[Mapping], about: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Replace the JSON file that names the parts; each has file, images and sha256."""
    held = {"images": sum(part["images"] for part in parts), "parts": parts, **about, "provenance": provenance}
    write_json(folder / MANIFEST, for_json({"format": FORMAT, "complete": complete, **held}))


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of each part that the JSON file of a result names with one; none where it cannot be read."""
    try:
        parts = read_json(folder / MANIFEST)["parts"]
        return {str(part["file"]): str(part["sha256"]) for part in parts if "sha256" in part}
    except (InputError, KeyError, TypeError):
        return {}


def images_in(folder: Path) -> int:
    """How many images the result in a folder holds; raises InputError where there is none."""
    return _manifest(folder)["images"]


def parts_to_replace(folder: Path) -> list[str]:
    """File names of the parts of an earlier result, as far as its JSON file names any; raises InputError where that file is another's."""
    if not (folder / MANIFEST).exists():
        return []
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{folder / MANIFEST} is not of format {FORMAT}, so no images of ours lie there: choose another folder")
    parts = manifest.get("parts")
    names = [part.get("file") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return [name for name in names if isinstance(name, str) and PART.fullmatch(name)]


def forget_run(folder: Path) -> None:
    """Remove what says how an earlier run in the folder goes on; its images stay. Raises InputError where that file is another program's."""
    path = folder / RUN
    if not path.exists() or not path.stat().st_size:
        return
    held = read_json(path)
    if not isinstance(held, dict) or held.get("format") != RUN_FORMAT:
        raise InputError(f"{path} is not of format {RUN_FORMAT}, so no run of ours lies there: choose another folder")
    run = held.get("run")
    if isinstance(run, str) and re.fullmatch("[0-9a-f]{32}", run):
        for checkpoint in folder.glob(f"checkpoint-{run[:8]}-*.safetensors"):
            checkpoint.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _manifest(folder: Path) -> dict:
    """The JSON file of a result, checked as far as its parts; raises InputError where it is none of ours."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} holds no sparse images: there is no {MANIFEST} in it")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}")
    parts = manifest.get("parts")
    if not (isinstance(parts, list) and parts and all(isinstance(part, dict) and isinstance(part.get("file"), str) for part in parts)):
        raise InputError(f"{folder} is damaged: {MANIFEST} names no parts")
    foreign = [part["file"] for part in parts if not PART.fullmatch(part["file"])]
    if foreign:
        raise InputError(f"{folder} is damaged: {MANIFEST} names {foreign[0]!r:.100}, which is no part of images or lies outside its folder")
    return manifest


def load(folder: Path) -> dict[str, Any]:
    """The fields of SparseImages, every finished batch; provenance["complete"] says whether the run ended. Raises InputError where there is no result
    or it is damaged."""
    manifest = _manifest(folder)
    try:
        parts = [read_tensors(folder / part["file"])[0] for part in manifest["parts"]]
        rows, columns = manifest["grid"]
        return {
            **{key: torch.cat([part[key] for part in parts]) for key in TENSORS},
            "grid": (int(rows), int(columns)),
            "mean": tuple(map(float, manifest["mean"])),
            "std": tuple(map(float, manifest["std"])),
            "provenance": {**manifest["provenance"], "complete": bool(manifest["complete"])},
        }
    except Exception as error:  # a part or a key that is missing, truncated or of another kind
        raise damaged(folder, error) from error


def damaged(folder: Path, error: Exception) -> InputError:
    """What to raise where a result cannot be put together."""
    return InputError(f"{folder} is damaged: what {MANIFEST} names cannot be read ({type(error).__name__}: {error})")
