"""The folder of a measurement's files, which may have to be copied from a machine that takes few and small ones."""

import re
from pathlib import Path

from ..measuring import rows_file

MOST_FILES, MOST_BYTES = 8, 16 << 20
NAME = re.compile(r"[A-Za-z0-9._-]+")
PROGRESS, LOG, SUMMARY = "progress.jsonl", "log.txt", "summary.txt"
LOG_BYTES = 4 << 20  # afterwards what the processes print is dropped


class TooLarge(RuntimeError):
    """A file would not be copied back."""


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a file of the folder. Raises TooLarge where it has grown to MOST_BYTES less a mebibyte."""
    if path.exists() and path.stat().st_size > MOST_BYTES - (1 << 20):
        raise TooLarge(f"{path.name} is full: {MOST_BYTES >> 20} MiB are copied back at most")
    rows_file.append(path, rows)


def write_bytes(path: Path, content: bytes) -> bool:
    """Write a whole file, unless it is too large to come back; whether it was written."""
    if len(content) > MOST_BYTES:
        return False
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
    return True


def faults(folder: Path) -> list[str]:
    """Why files of the folder would not come back; none if all do."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    found = [f"{len(files)} files, {MOST_FILES} come back at most"] if len(files) > MOST_FILES else []
    for path in files:
        if path.is_symlink() or not NAME.fullmatch(path.name) or path.parent != folder:
            found.append(f"{path.relative_to(folder)}: only plain files of the folder itself come back, named in letters, digits, '.', '_' and '-'")
        elif path.stat().st_size > MOST_BYTES:
            found.append(f"{path.name}: {path.stat().st_size} bytes, {MOST_BYTES} come back at most")
    return found
