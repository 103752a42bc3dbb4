"""Whether every file of a run is what was written; what is not is moved aside, and the index is written again for the shards that are."""

from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from ..errors import InputError
from ..files import digest_of, read_json, read_tensors
from ..images.storage import FORMAT, MANIFEST, PART, TENSORS, write_index
from .folder import RunFolder, read_run

ASIDE = ".damaged"  # after the name of a file that is not what was written


@dataclass
class Verified:
    """What a folder holds. Names are those of files."""

    intact: list[str] = field(default_factory=list)  # shards that are what was written
    damaged: dict[str, str] = field(default_factory=dict)  # why each other file is not; it now has ASIDE after its name, where it is there at all
    unnamed: list[str] = field(default_factory=list)  # shards that are intact, and that the index lacked
    missing: int | None = None  # batches that are still to be made; None where nothing says what was asked

    @property
    def sound(self) -> bool:
        """Whether nothing was damaged."""
        return not self.damaged


def verify_run(folder: str | Path) -> Verified:
    """Check every file of a run, or of saved images, and mend the index.

    A shard is held to its hash; one that the index does not name yet is read. The same `smi invert` makes again what was damaged. Raises InputError
    where the folder holds neither a run nor images.
    """
    folder = Path(folder)
    run, index = read_run(folder), _index(folder)
    if run is None and index is None:
        raise InputError(f"{folder} holds no run: there is neither a run.json nor a {MANIFEST} of ours in it")
    named = {part["file"]: part for part in (index or {}).get("parts", [])}
    shards = {name for _, name in run.shards().values()} if run is not None else set()
    found = Verified()
    for name in sorted(named.keys() | shards):
        why = _why_damaged(folder / name, named.get(name, {}).get("sha256"))
        if why is None:
            found.intact.append(name)
            found.unnamed += [name] if name not in named else []
        else:
            found.damaged[name] = why
    for path in sorted([*folder.glob("checkpoint-*.safetensors"), *folder.glob("progress.safetensors")]):
        why = _why_damaged(path, None, tensors=())
        if why is not None:
            found.damaged[path.name] = why
    for name in found.damaged:
        if (folder / name).is_file():
            (folder / name).replace(folder / (name + ASIDE))
    _mend(folder, run, index, found)
    found.missing = None if run is None else len(run.missing())
    return found


def _index(folder: Path) -> dict | None:
    """The JSON file of images, as far as it names parts of ours; None where there is none, or one that cannot be read."""
    try:
        index = read_json(folder / MANIFEST)
    except InputError:
        return None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        return None
    parts = index.get("parts") if isinstance(index.get("parts"), list) else []
    ours = [part for part in parts if isinstance(part, dict) and isinstance(part.get("file"), str) and PART.fullmatch(part["file"])]  # type: ignore[union-attr]
    return {**index, "parts": ours}


def _why_damaged(path: Path, sha256: object, tensors: tuple[str, ...] = TENSORS) -> str | None:
    """What is wrong with a file, None where nothing is. sha256: of its bytes, None where it is not known and the tensors are looked for."""
    try:
        if sha256 is not None:
            return None if digest_of(path) == sha256 else "its bytes are not those that were written"
        held, _ = read_tensors(path)
    except FileNotFoundError:
        return "it is not there"
    except (OSError, SafetensorError) as error:
        return f"it cannot be read ({getattr(error, 'strerror', None) or error})"
    lacking = [name for name in tensors if name not in held]
    return f"it lacks {', '.join(lacking)}" if lacking else None


def _mend(folder: Path, run: RunFolder | None, index: dict | None, found: Verified) -> None:
    """Write the index for the shards that are intact; without any there is none."""
    of_run = run is not None and bool(run.shards())
    if run is not None and of_run:
        run.index()
    elif index is not None and found.damaged.keys() & {part["file"] for part in index["parts"]}:
        parts = [part for part in index["parts"] if part["file"] in found.intact]
        about = {name: index.get(name) for name in ("grid", "mean", "std")}
        write_index(folder, False, parts, about, index.get("provenance", {})) if parts else (folder / MANIFEST).unlink()
