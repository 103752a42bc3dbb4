"""Files are replaced whole or not at all; folders for output hold nothing that the caller would lose.

`force` allows a folder that is not empty. Then an inversion replaces the parts that images.json names (images/storage.py, runs/folder.py), an export
the files that its index.json names (images/export.py), and a distillation the files of an earlier distillation (distillation/run_folder.py). Each
refuses a folder where what it would replace is of something else.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .csrc.cache import json_of, replace_file, sync, written_beside
from .errors import InputError

__all__ = ["create_file", "digest_of", "left_by_a_kill", "output_folder", "read_json", "read_tensors", "replace_file", "write_json", "write_text"]

LARGEST_JSON = 1 << 28  # bytes


def output_folder(folder: str | Path, force: bool = False) -> Path:
    """The folder, made if need be; raises InputError where it is a file, cannot be written, or is not empty and not `force`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder} is a file: it must be a folder")
    if "\0" in str(folder):
        raise InputError("an output folder's name cannot hold a NUL character")
    try:
        if folder.is_dir() and not force and not all(left_by_a_kill(entry.name) for entry in folder.iterdir()):
            raise InputError(
                f"output folder {folder} is not empty: choose another, or pass --force (force=True) to replace what was written there before"
            )
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"output folder {folder} cannot be written ({error.strerror}): choose another") from error
    return folder


def left_by_a_kill(name: str) -> bool:
    """Whether a file of that name is temporary, one of ours or of safetensors, which a killed process leaves."""
    return name.startswith(".") and (name.startswith(".tmp") or name.endswith(".tmp"))


def create_file(path: Path, write: Callable[[Path], object]) -> bool:
    """Call write(temporary path) and give the result the name `path`, unless that name is taken: then False.

    Of several processes one wins, also on NFS, and it is on the disk. On a file system without hard links the content may be the last writer's.
    """
    with written_beside(path, write, durable=True) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            if temporary.stat().st_nlink < 2:  # NFS may repeat a request that it has carried out
                return False
        except OSError:
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                if path.stat().st_size:
                    return False  # an empty one was claimed by a process that has died or is about to fill it
            os.replace(temporary, path)
    sync(path.parent)
    return True


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises InputError where it cannot be read or is larger than any that we write."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON >> 20} MiB")
        return json_of(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {getattr(error, 'strerror', None) or error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises OSError where it is no regular file (a pipe waits), SafetensorError where it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (a handle, not a dict)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), durable=True)


def write_json(path: Path, value: object) -> None:
    """Replace `path` by `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")
