"""The user's cache folder, and files that are replaced whole."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """smi/PARTS in $XDG_CACHE_HOME or ~/.cache; not made."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("smi", *parts)


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
