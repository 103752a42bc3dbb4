"""The user's cache folder, JSON read from it, libraries kept in it with their digests, and files that are replaced whole."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_folder(*parts: str) -> Path:
    """smi/PARTS in $XDG_CACHE_HOME or ~/.cache; not made."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("smi", *parts)


def json_of(path: Path) -> Any:
    """What a JSON file holds. Raises OSError or ValueError where it cannot be read, is nested too deeply, or is no regular file: a pipe waits."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error


def seal(path: Path) -> None:
    """Write the digest of a library that was just built beside it."""
    replace_file(_seal(path), lambda temporary: temporary.write_text(_digest(path)))


def is_sealed(path: Path) -> bool:
    """Whether a library is there and what `seal` saw: one cut short would end the process that loads it."""
    try:
        return path.is_file() and _seal(path).is_file() and _seal(path).read_text() == _digest(path)
    except (OSError, ValueError):
        return False


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path) and move the result to `path` in one step: nobody sees half a file, and nothing is left behind where that fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's permissions, which some writers narrow
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
