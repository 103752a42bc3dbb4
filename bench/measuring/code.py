"""Which code is measured: its commit, whether it is exactly that, and a digest of its files.

Where there is no git, as in a copy that was packed for another machine, commit and cleanliness come from the file PACKED, which `make gpu-pack`
writes. They hold only while the files have the digest that was written with them: code that was changed after packing is dirty.
"""

import hashlib
import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKED = "gpu-pack/commit.json"
FOLDERS = ("smi", "kernels", "csrc", "bench")
SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".json", ".safetensors")
RESULTS = "bench/results/"  # rows are not code


def git(*arguments: str) -> str | None:
    """Output of git in the repository; None where there is no git or no repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> dict:
    """{"commit", "dirty"}: from git or, without it, as it was packed; unknown and dirty where neither says."""
    head = git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None  # git would find a repository around a copy
    if head is None:
        return packed()
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(top,exclude){RESULTS.rstrip('/')}")
    return {"commit": head, "dirty": changes is None or bool(changes)}


def packed() -> dict:
    """What PACKED says, dirty where the code has changed since."""
    try:
        written = json.loads((ROOT / PACKED).read_text())
        return {"commit": written["commit"], "dirty": written["dirty"] or written["digest"] != digest()}
    except (OSError, ValueError, KeyError):
        return {"commit": "unknown", "dirty": True}


def digest() -> str:
    """Of the names and contents of all files of the code."""
    found = hashlib.sha256()
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(RESULTS):
            found.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:16]
