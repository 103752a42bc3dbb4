"""The user's cache folder, JSON read from it, libraries kept in it with their digests, and files that are replaced whole."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def replace_file(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Call write(temporary path) and move the result to `path` in one step: nobody sees half a file, and nothing is left behind where that fails.

    durable: also a power cut leaves the earlier file or the later one, for some milliseconds of waiting.
    """
    with written_beside(path, write, durable=durable) as temporary:
        os.replace(temporary, path)
    if durable:
        sync(path.parent)


@contextmanager
def written_beside(path: Path, write: Callable[[Path], object], *, durable: bool) -> Iterator[Path]:
    """A temporary file beside `path` that write(temporary path) has made; it is gone afterwards. durable: its content is on the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's permissions, which some writers narrow
        write(temporary)
        temporary.chmod(mode)
        if durable:
            sync(temporary)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
