"""The folder of a run: `run.json` says what was asked, each batch is a shard that is written once, `images.json` names the shards with their hashes.

A shard that lies there under its name is finished, whoever was killed. `images.json` follows from `run.json` and the shards. It is written again
after each shard; where a process was stopped in between, the next one writes it. A batch is a pure function of what was asked and its number: any
process may make it, in any order.
"""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import InputError, RunError
from ..files import create_file, digest_of, output_folder, read_json, read_tensors, write_json
from ..images.sparse_images import SparseImages
from ..images.storage import PART, RUN, RUN_FORMAT, TENSORS, damaged, forget_run, hashes_of, parts_to_replace, write_index, write_part
from ..plain import for_json
from .asked import UNNAMED
from .checkpoint import Checkpoint
from .lease import Leases

POLL = 0.5  # seconds between two looks at what other processes make
FIELDS = {"run": str, "asked": dict, "num_images": int, "images_per_batch": int, "about": dict, "provenance": dict, "replaces": list}


@dataclass(eq=False)
class RunFolder:
    """What `run.json` holds, and what the folder holds of it."""

    folder: Path
    run: str  # hexadecimal, drawn when the run was begun
    asked: dict[str, Any]  # what decides the images, as JSON; tensors by their hashes
    num_images: int
    images_per_batch: int
    about: dict[str, Any]  # grid, mean and std
    provenance: dict[str, Any]
    replaces: list[str] = field(default_factory=list)  # parts of an earlier result, which go when there are new ones
    made_folder: bool = False  # by this process
    hashes: dict[str, str] = field(default_factory=dict)  # of shards, as far as they are known

    @property
    def prefix(self) -> str:
        return self.run[:8]

    def planned(self) -> list[int]:
        """Images of each batch; the last may be short."""
        return [min(self.images_per_batch, self.num_images - start) for start in range(0, self.num_images, self.images_per_batch)]

    def shards(self) -> dict[int, tuple[int, str]]:
        """Number of each batch that lies in the folder, with its images and its file name; of a batch that was made short and again, the longer."""
        return _longest(self._files())

    def _files(self) -> list[tuple[int, int, str]]:
        form = re.compile(rf"images-{self.prefix}-([0-9]{{5,}})-([0-9]+)\.safetensors")
        found = [(match, path) for path in self.folder.iterdir() if (match := form.fullmatch(path.name)) and _bytes(path)]
        return sorted((int(match[1]), int(match[2]), path.name) for match, path in found)

    def missing(self) -> list[int]:
        """Numbers of the batches that are still to be made."""
        shards = self.shards()
        return [batch for batch, images in enumerate(self.planned()) if shards.get(batch, (0,))[0] < images]

    def take(self) -> Iterator[int]:
        """The batches that this process is to make, one after another, each leased while the caller makes it; ends when none is missing."""
        leases = Leases(self.folder, self.prefix)
        while left := self.missing():
            idle = True
            for batch in left:
                with leases.claim(batch) as ours:
                    if ours and batch in self.missing():
                        idle = False
                        yield batch
            if idle:
                time.sleep(POLL)

    def checkpoint(self, batch: int, every: float, beside: Mapping | None = None) -> Checkpoint:
        """The checkpoint of a batch."""
        return Checkpoint(self.folder / f"checkpoint-{self.prefix}-{batch:05d}-{self.planned()[batch]}.safetensors", every, beside)

    def publish(self, batch: int, part: SparseImages) -> None:
        """Write a finished batch; when this returns it is on disk. Raises RunError where writing fails."""
        name = f"images-{self.prefix}-{batch:05d}-{len(part)}.safetensors"
        try:
            create_file(self.folder / name, lambda path: write_part(path, {key: getattr(part, key) for key in TENSORS}, self.about))
            for path in self.folder.glob(f"checkpoint-{self.prefix}-{batch:05d}-*.safetensors"):
                path.unlink(missing_ok=True)
            self.index()
        except (OSError, SafetensorError) as error:
            kept = sum(images for images, _ in self.shards().values())
            reason = getattr(error, "strerror", None) or error
            raise RunError(f"writing to {self.folder} failed ({reason}): {kept} images are kept there") from error

    def index(self) -> None:
        """Write `images.json` for the shards that lie there, and remove what they replace: parts of an earlier result, and short batches that were
        made again. Raises RunError where another run was begun in the folder meanwhile."""
        while shards := _longest(files := self._files()):  # once more where another process has finished a batch meanwhile
            self._refuse_another()
            known = {**hashes_of(self.folder), **self.hashes}
            try:
                self.hashes = {name: known.get(name) or digest_of(self.folder / name) for _, name in shards.values()}
            except FileNotFoundError:  # made again by another process
                continue
            parts = [{"file": name, "images": images, "sha256": self.hashes[name]} for images, name in shards.values()]
            write_index(self.folder, not self.missing(), parts, self.about, self.provenance)
            for name in {name for _, _, name in files} - {name for _, name in shards.values()} | set(self.replaces):
                (self.folder / name).unlink(missing_ok=True)
            if self.shards() == shards:
                return

    def _refuse_another(self) -> None:
        try:
            there = read_run(self.folder)
        except InputError:
            there = None
        if there is None or there.run != self.run:
            raise RunError(f"another run was begun in {self.folder} while this one went on: give each a folder of its own")

    def load(self, batch: int) -> SparseImages:
        """A finished batch. Raises InputError where it is damaged."""
        try:
            tensors, _ = read_tensors(self.folder / self.shards()[batch][1])
            fields: dict[str, Any] = {**{name: tensors[name] for name in TENSORS}, **self.about, "provenance": self.provenance}
            return SparseImages(**fields)
        except Exception as error:  # truncated, or tensors that are missing or do not fit
            raise damaged(self.folder, error) from error

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        """End this process's part; a run of which nothing was made leaves nothing."""
        if self._begun():
            return
        (self.folder / RUN).unlink(missing_ok=True)
        if self.made_folder:
            with suppress(OSError):  # something of the caller's lies there by now
                self.folder.rmdir()

    def _begun(self) -> bool:
        return bool(self.shards()) or any(self.folder.glob(f"checkpoint-{self.prefix}-*")) or Leases(self.folder, self.prefix).held()

    def write(self) -> None:
        """Replace `run.json`."""
        write_json(self.folder / RUN, self.to_json())

    def to_json(self) -> dict:
        return {"format": RUN_FORMAT, **{name: for_json(getattr(self, name)) for name in FIELDS}}


def read_run(folder: Path) -> RunFolder | None:
    """The run that a folder holds, None where it holds none. Raises InputError where `run.json` is damaged or another program's."""
    path = folder / RUN
    if not path.exists() or not path.stat().st_size:
        return None
    held = read_json(path)
    if not isinstance(held, dict) or held.get("format") != RUN_FORMAT:
        raise InputError(f"{path} is not of format {RUN_FORMAT}: choose another folder")
    wrong = [name for name, kind in FIELDS.items() if type(held.get(name)) is not kind]
    wrong = wrong or [name for name in held["replaces"] if not (isinstance(name, str) and PART.fullmatch(name))]
    if wrong or not re.fullmatch("[0-9a-f]{32}", held["run"]) or min(held["num_images"], held["images_per_batch"]) < 1:
        raise InputError(f"{path} is damaged: choose another folder, or pass --force (force=True) to start anew")
    return RunFolder(folder, **{name: held[name] for name in FIELDS})


def open_run(new: RunFolder, *, force: bool = False) -> RunFolder:
    """The run in the folder of `new`: begun as that, or, where one was asked the same, gone on with, for as many images as `new` has.

    Raises InputError where the folder holds a run that was asked something else or more images, anything that is not a run's and not `force`, or
    cannot be written.
    """
    folder = new.folder
    held = None if force else read_run(folder)
    if held is not None and (held._begun() or held.asked == new.asked):
        return _gone_on_with(held, new)
    new.made_folder = not folder.exists()
    output_folder(folder, force or (folder / RUN).exists())
    new.replaces = parts_to_replace(folder)  # refuses another program's images.json
    forget_run(folder)
    if not create_file(folder / RUN, lambda path: write_json(path, new.to_json())):  # another process began it
        return open_run(new)
    return new


def _gone_on_with(held: RunFolder, new: RunFolder) -> RunFolder:
    asked = for_json(new.asked)
    different = [name for name in {**asked, **held.asked} if asked.get(name) != held.asked.get(name)]
    if new.num_images < held.num_images:
        different.append(f"num_images ({held.num_images}, and no fewer can be asked for)")
    if different:
        raise InputError(
            f"{held.folder} holds a run with other {', '.join(different)}: choose another folder, or pass --force (force=True) to start anew"
        )
    unnamed = [name for name, value in asked.items() if UNNAMED in (value if isinstance(value, list) else [value])]
    if unnamed:
        raise InputError(
            f"{held.folder} holds a run with a function of yours as {', '.join(unnamed)}, which cannot be compared with this one: "
            f"name what it computes by label= (--label), or pass --force (force=True) to start anew"
        )
    if new.num_images > held.num_images:
        held.num_images = new.num_images
        held.provenance = {**new.provenance, **{name: held.provenance[name] for name in ("run", "date") if name in held.provenance}}
        held.write()
    if held.shards():
        held.index()
    return held


def _longest(files: list[tuple[int, int, str]]) -> dict[int, tuple[int, str]]:
    """Images and file name by batch, of (batch, images, name) in order: the longer replaces the shorter."""
    return {batch: (images, name) for batch, images, name in files}


def _bytes(path: Path) -> int:
    """Of a file; 0 where it is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
