"""Verdicts on GPU versions, and where they are kept: those that ship with the package, those in the user's cache directory."""

import hashlib
import json
import math
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import NamedTuple

import torch

from smi.csrc import build
from smi.csrc.cache import cache_folder, json_of, replace_file

from . import versions

VERIFIED = Path(__file__).parent / "verified.json"
COMPILED_BY = ("triton", "ptxas", "source")  # of a version's identity, what decides its machine code


class Key(NamedTuple):
    """What a verdict is about: exactly that which is about to be called."""

    operation: str
    function: str  # forward, backward, ...
    version: str
    dtype: str  # bfloat16, ...
    size: str  # a class of the operation's sizes.py

    def __str__(self) -> str:
        return f"{self.operation} {self.function} ({self.version}, {self.dtype}, {self.size})"


class Verdict(NamedTuple):
    """What is known about a key on a GPU.

    outcome: "correct"; "incorrect" by the error rule; "unsupported", it says itself that it does not take these; "failed", it cannot be compiled or
    raised; "crashed", an error of CUDA, no answer, or too little memory, which may lie in the machine and is found out anew by the next process.
    """

    operation: str
    function: str
    version: str
    dtype: str
    size: str
    outcome: str
    speedup: float  # median time of the best stock composition over its own; 0 where it was not timed
    note: str  # largest error and what the rule allows, or what went wrong

    @property
    def key(self) -> Key:
        return Key(*self[:5])

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"

    @property
    def wrong(self) -> bool:
        """Whether something is to be mended."""
        return self.outcome not in ("correct", "unsupported")

    @property
    def lasting(self) -> bool:
        """Whether it would be the same another time."""
        return self.outcome != "crashed"

    @property
    def chosen(self) -> bool:
        return self.correct and self.speedup > 1

    @property
    def reason(self) -> str:
        """Its speed, or why it has none."""
        return f"{self.speedup:.2f} times the speed of stock PyTorch" if self.correct else self.note


def verdict_of(key: Key, outcome: str, note: str, speedup: float = 0.0) -> Verdict:
    return Verdict(*key, outcome, speedup, note)


def find(verdicts: list[Verdict], key: Key) -> Verdict | None:
    return next((v for v in verdicts if v.key == key), None)


def say(text: str) -> None:
    print(f"smi: {text}", file=sys.stderr, flush=True)


# ---- identity: all on which a verdict depends


def architecture(device: torch.device) -> str:
    """For example sm_90; "cpu" there."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else device.type


def installed(package: str) -> str:
    try:
        return version_of(package)
    except PackageNotFoundError:
        return "not installed"


@cache
def ptxas(capability: tuple[int, int]) -> str:
    """Version of the assembler that Triton runs for a GPU, for example 12.8.93; TRITON_PTXAS_PATH may name another than the one it ships."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        text = subprocess.run([get_ptxas(10 * capability[0] + capability[1]).path, "--version"], capture_output=True, text=True, check=True).stdout
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError):
        return "not found"
    found = re.search(r"V([\d.]+)", text)
    return found[1] if found else "unknown"


def sources(operation: str) -> list[Path]:
    """All files on which a verdict depends: the operation's and those of operations that it imports, what operations share, timed tiles, and csrc
    with its CUDA sources."""
    kernels, csrc = Path(__file__).parent, Path(build.__file__).parent
    own = list((kernels / operation).glob("*.py"))
    imported = {name for path in own for name in re.findall(r"from \.\.(\w+)\.", path.read_text())} & set(versions.OPERATIONS)
    shared = [*kernels.glob("*.py"), *kernels.glob("tiles/*.json"), *csrc.glob("*.py"), *build.FOLDER.iterdir()]
    return sorted([*shared, *own, *(path for name in imported - {operation} for path in (kernels / name).glob("*.py"))])


def source(operation: str) -> str:
    """A digest of the sources."""
    digest = hashlib.sha256()
    for path in sources(operation):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def identity(operation: str, device: torch.device) -> dict[str, str]:
    """All on which a verdict depends: another value of any asks for a new check. Not the driver, which compiles none of this."""
    on_gpu = device.type == "cuda"
    return {
        "operation": operation,
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "architecture": architecture(device),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "ptxas": ptxas(torch.cuda.get_device_capability(device)) if on_gpu else "none",
        "smi": installed("sparse-model-inversion"),
        "source": source(operation),
    }


# ---- kept verdicts


@cache
def shipped() -> dict[str, list[dict]]:
    """Architecture -> rows of the committed table."""
    return json.loads(VERIFIED.read_text())["architectures"]


def committed(operation: str, device: torch.device) -> list[Verdict]:
    """The verdicts shipped for an architecture that are about the machine code which would run here: same sources, Triton and ptxas."""
    rows = [row for row in shipped().get(architecture(device), []) if row["operation"] == operation]
    here = identity(operation, device) if rows else {}
    return [from_row(row) for row in rows if all(row[name] == here[name] for name in COMPILED_BY)]


def from_row(row: dict) -> Verdict:
    return Verdict(**{field: row[field] for field in Verdict._fields})


def cache_file(key: dict[str, str]) -> Path:
    return cache_folder("verdicts") / f"{key['operation']}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"


def cached(operation: str, device: torch.device, kind: str = "verdicts") -> list[Verdict]:
    """The verdicts kept for this operation on this device; none where there is no file or it cannot be read. kind: "crashes" for what went wrong the
    last time, which is to be shown and not to be relied on."""
    key = identity(operation, device)
    try:
        content = json_of(cache_file(key))
        return [_checked(Verdict(**row)) for row in content[kind]] if content["identity"] == key else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _checked(found: Verdict) -> Verdict:
    """The verdict. Raises ValueError where a field is of another type, or the speed-up no number of at least 0."""
    *words, speedup, note = found
    if any(type(word) is not str for word in (*words, note)) or type(speedup) not in (int, float) or not 0 <= speedup < math.inf:
        raise ValueError("a field is of another type")
    return found


def keep(found: Verdict, device: torch.device) -> None:
    """Add a verdict to the user's cache, replacing its predecessor; a cache that cannot be written is reported, not fatal."""
    key = identity(found.operation, device)
    path = cache_file(key)
    kept = {kind: [v for v in cached(found.operation, device, kind) if v.key != found.key] for kind in ("verdicts", "crashes")}
    kept["verdicts" if found.lasting else "crashes"].append(found)
    text = json.dumps({"identity": key} | {kind: [v._asdict() for v in some] for kind, some in kept.items()}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        say(f"the verdict on {found.operation} could not be kept in {path.parent}: {error}")


def on_device(operation: str, device: torch.device) -> list[Verdict]:
    """All that is known about an operation on a device without a check: shipped, kept, and what went wrong the last time."""
    found: dict[Key, Verdict] = {}
    for verdict in (*cached(operation, device, "crashes"), *cached(operation, device), *committed(operation, device)):
        found[verdict.key] = verdict
    return list(found.values())
