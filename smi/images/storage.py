"""Sparse images on disk: numbered safetensors parts and one JSON file that names them.

A part is written under a temporary name, moved, and only then named in the JSON file, which is replaced in one move: whenever a run is killed, the
folder holds exactly the batches that were finished. Nothing of the caller's own in the folder is ever touched.
"""

import json
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import InputError, RunError
from ..files import output_folder, replace_file, write_json
from .sparse_images import TENSORS, SparseImages

MANIFEST = "images.json"
FORMAT = "smi.SparseImages/1"


class Writer:
    """Writes batches of SparseImages to a folder as they are finished.

    Raises InputError when made if the folder is not empty and not `force`, or cannot be written.
    """

    def __init__(self, folder: str | Path, *, force: bool = False):
        self.folder = Path(folder)
        self.parts: list[dict] = []
        self.images = 0
        self.run = uuid.uuid4().hex[:8]  # part names of different runs never clash, so replacing a result is safe
        self.provenance: dict = {}
        self.made = not self.folder.exists()
        output_folder(self.folder, force)
        self.replaced = _parts_to_replace(self.folder)

    def add(self, images: SparseImages) -> None:
        """Write one finished batch; when this returns it is on disk."""
        name = f"images-{self.run}-{len(self.parts):05d}.safetensors"
        tensors = {key: getattr(images, key).cpu().contiguous() for key in TENSORS}
        meta = {"grid": images.grid, "mean": images.mean, "std": images.std}
        try:
            replace_file(
                self.folder / name, lambda path: save_file(tensors, path, metadata={"format": FORMAT, **{k: json.dumps(v) for k, v in meta.items()}})
            )
            self.parts.append({"file": name, "images": len(images)})
            self.images += len(images)
            self.provenance = images.provenance
            self._commit(complete=False, **meta)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"writing to {self.folder} failed ({getattr(error, 'strerror', None) or error}): {self.images} images are kept there"
            ) from error
        for part in self.replaced:
            (self.folder / part).unlink(missing_ok=True)
        self.replaced = []
        self.meta = meta

    def close(self, complete: bool) -> None:
        """End the result; a folder that was made for it and got no images is removed."""
        if self.parts:
            self._commit(complete=complete, **self.meta)
        elif self.made:
            self.folder.rmdir()

    def _commit(self, complete: bool, **meta) -> None:
        manifest = {"format": FORMAT, "complete": complete, "images": self.images, "parts": self.parts, **meta, "provenance": self.provenance}
        write_json(self.folder / MANIFEST, manifest)


def images_in(folder: Path) -> int:
    """How many images the result in a folder holds; raises InputError where there is none."""
    return _manifest(folder)["images"]


def _parts_to_replace(folder: Path) -> list[str]:
    """File names of the parts of an earlier result, as far as its JSON file can be read."""
    try:
        return [part["file"] for part in _manifest(folder)["parts"]]
    except InputError:
        return []


def _manifest(folder: Path) -> dict:
    """The JSON file of a result, checked as far as its parts; raises InputError where it is none of ours."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} holds no sparse images: there is no {MANIFEST} in it")
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}")
    parts = manifest.get("parts")
    if not (isinstance(parts, list) and parts and all(isinstance(part, dict) and isinstance(part.get("file"), str) for part in parts)):
        raise InputError(f"{folder} is damaged: {MANIFEST} names no parts")
    if any(Path(part["file"]).name != part["file"] for part in parts):
        raise InputError(f"{path} names files outside its folder")
    return manifest


def load(folder: str | Path) -> SparseImages:
    """Read every finished batch; provenance["complete"] says whether the run ended."""
    folder = Path(folder)
    manifest = _manifest(folder)
    try:
        parts = [load_file(folder / part["file"]) for part in manifest["parts"]]
        rows, columns = manifest["grid"]
        return SparseImages(
            **{key: torch.cat([part[key] for part in parts]) for key in TENSORS},
            grid=(int(rows), int(columns)),
            mean=tuple(map(float, manifest["mean"])),
            std=tuple(map(float, manifest["std"])),
            provenance={**manifest["provenance"], "complete": bool(manifest["complete"])},
        )
    except Exception as error:  # a part or a key that is missing, truncated or of another kind
        raise InputError(f"{folder} is damaged: what {MANIFEST} names cannot be read ({type(error).__name__}: {error})") from error
