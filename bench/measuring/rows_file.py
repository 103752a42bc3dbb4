"""Files of JSON lines that only grow. A row is on disk when `append` returns: a process that is killed afterwards loses none."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


def append(path: Path | None, rows: Iterable[dict]) -> None:
    """Add rows to a file; nothing in it is ever rewritten. Without a path nothing is written.

    All lines go out in one write to the end of the file, so that processes side by side do not mix theirs.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with path.open("ab", buffering=0) as file:
        if file.tell() and not ends_with_newline(path):
            text = b"\n" + text  # after a line that a killed process left unfinished
        file.write(text)
        os.fsync(file.fileno())


def ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read(path: Path) -> list[dict]:
    """All whole rows of a file, oldest first; none where there is no file. A line that a killed process left unfinished is no row."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for line in lines if (row := whole(line)) is not None]


def whole(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
