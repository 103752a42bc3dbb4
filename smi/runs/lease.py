"""Leases: which process makes which batch of a run that several processes share through a folder, also on NFS.

A lease is a file that its owner keeps writing. It only saves work: a batch that two processes make is the same, and the first to publish it wins. No
clock is compared with another machine's: a lease has ended when an observer has not seen its content change for LEASE seconds of its own.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ..errors import InputError
from ..files import create_file, read_json, replace_file

LEASE = 60.0  # seconds
BEATS = 6  # within a lease


class Leases:
    """The leases of a folder as one process sees them; `prefix` begins their files' names."""

    def __init__(self, folder: Path, prefix: str, seconds: float | None = None):
        self.folder, self.prefix = folder, prefix
        self.seconds = LEASE if seconds is None else seconds
        self.seen: dict[str, tuple[object, float]] = {}  # content of a lease, and when it was first seen

    @contextmanager
    def claim(self, batch: int) -> Iterator[bool]:
        """Whether the batch is this process's within the block, in which its lease is kept alive."""
        path = self.folder / f"{self.prefix}-{batch:05d}.lease"
        owner = {**_this_process(), "owner": uuid.uuid4().hex}
        if not (_take(path, owner) or (self._ended(path) and _remove(path) and _take(path, owner))):
            yield False
            return
        stop = threading.Event()
        beating = threading.Thread(target=_keep, args=(path, owner, self.seconds / BEATS, stop), daemon=True)
        beating.start()
        try:
            yield True
        finally:
            stop.set()
            beating.join()
            if _owner(path) == owner["owner"]:
                _remove(path)

    def held(self) -> bool:
        """Whether any lease lies in the folder that has not ended."""
        return any(not self._ended(path) for path in self.folder.glob(f"{self.prefix}-*.lease"))

    def _ended(self, path: Path) -> bool:
        content = _read(path)
        if content is None and not path.exists():
            return True
        if content is not None and _has_died(content):
            return True
        now = time.monotonic()
        if self.seen.get(path.name, (object(),))[0] != content:
            self.seen[path.name] = content, now
        return now - self.seen[path.name][1] > self.seconds


def _take(path: Path, owner: dict) -> bool:
    return create_file(path, lambda temporary: temporary.write_text(json.dumps({**owner, "beat": 0})))


def _keep(path: Path, owner: dict, every: float, stop: threading.Event) -> None:
    """Write the lease again and again, as long as it is the owner's."""
    beat = 0
    while not stop.wait(every) and _owner(path) == owner["owner"]:
        beat += 1
        content = json.dumps({**owner, "beat": beat})
        with suppress(OSError):  # a full disk: others may take the batch over, nothing is lost
            replace_file(path, lambda temporary, content=content: temporary.write_text(content))


def _read(path: Path) -> dict | None:
    """The content of a lease; None where there is none, or half of one."""
    try:
        content = read_json(path)
    except InputError:
        return None
    return content if isinstance(content, dict) else None


def _owner(path: Path) -> object:
    return (_read(path) or {}).get("owner")


def _remove(path: Path) -> bool:
    """Remove a lease; False where another process was faster."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


@cache
def _machine() -> str:
    """This machine since it was started, and its process numbers."""
    try:
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # not told: no process is taken for one of this machine


def _this_process() -> dict:
    import psutil

    return {"machine": _machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _has_died(content: dict) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    import psutil

    if content.get("machine") != _machine() or not isinstance(content.get("pid"), int):
        return False
    try:
        process = psutil.Process(content["pid"])
        return process.create_time() != content.get("started") or process.status() == psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return True
    except psutil.Error:
        return False
