"""Targets of damaged files: for every kind of file and every kind of damage."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smi.errors import InputError, RunError

from . import edits, payloads
from .damage import Anatomy
from .draw import Draw
from .kinds import Kind, every, make_samples
from .target import Target, Wrong, refused

SECONDS = 20.0


def targets(work: Path, only: str = "", kinds: Sequence[Kind] | None = None) -> list[Target]:
    """One target for each kind of file, those with this text in their name, and each kind of damage. work: where samples lie."""
    chosen = [kind for kind in (every() if kinds is None else kinds) if only in kind.name]
    samples, made = make_samples(chosen, work / "samples"), []
    payloads.contents()
    for kind in chosen:
        sample = samples[kind.group]
        file = next(sample.glob(kind.file)).relative_to(sample)
        anatomy = Anatomy(kind.form, (sample / file).read_bytes())
        check = Check(kind, sample, file, anatomy.data)
        check({"edits": []}, work / "samples" / ".checked")  # sound files are read
        for damage in anatomy.damages():
            made.append(Target("files", kind.name, damage, partial(_case, anatomy, damage), check, kind.weight, SECONDS))
    return made


def _case(anatomy: Anatomy, damage: str, draw: Draw) -> dict[str, Any]:
    return {"edits": anatomy.make(damage, draw)}


class Check:
    """Reads a damaged copy of a sample."""

    def __init__(self, kind: Kind, sample: Path, file: Path, data: bytes) -> None:
        self.kind, self.sample, self.file, self.data = kind, sample, file, data

    def __call__(self, case: dict, folder: Path) -> str:
        """ "refused" or "read". folder: for a copy of the sample, which stays for the next case."""
        copy = folder / self.kind.group
        if not copy.exists():
            shutil.copytree(self.sample, copy)
        edits.write(copy / self.file, edits.damaged(self.data, case["edits"]))
        before = set(folder.iterdir())
        try:
            outcome = self._read(copy)
        finally:
            if (copy / self.file).is_dir() and not (copy / self.file).is_symlink():
                (copy / self.file).rmdir()
        if set(folder.iterdir()) != before or _executed():
            raise Wrong("a payload was executed")
        return outcome

    def _read(self, copy: Path) -> str:
        try:
            found = self.kind.read(copy)
        except (InputError, RunError) as error:
            return refused(error)
        self.kind.use(found)
        return "read"


def _executed() -> bool:
    """Whether a payload has left its mark, which is removed."""
    mark = Path(payloads.MARK)
    if not mark.exists():
        return False
    mark.rmdir()
    return True
