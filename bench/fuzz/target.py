"""What is fuzzed: a target makes cases and checks them; what leaves its check as an exception is a finding."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smi.errors import InputError, RunError

from .draw import Draw

ROOT = Path(__file__).parents[2]
LONGEST = 2000  # characters of a sentence
REFUSED = "refused"


class Wrong(AssertionError):
    """The package neither did what was right nor refused: another gradient, an executed payload, a sentence that is none.

    what: the same for findings of one cause. details: of this one."""

    def __init__(self, what: str, details: str = "") -> None:
        super().__init__(": ".join(filter(None, [what, details])))
        self.what = what


@dataclass(frozen=True)
class Target:
    """Cases of one kind. what, name, part: by which campaigns count and report. make: a case, plain JSON. check: the outcome of a case by name, given
    a folder of its own; raises what is a finding. weight: its share of the cases. seconds: a case that takes longer hangs."""

    what: str
    name: str
    part: str
    make: Callable[[Draw], dict]
    check: Callable[[dict, Path], str]
    weight: float = 1.0
    seconds: float = 20.0

    @property
    def title(self) -> str:
        return f"{self.what}: {self.name}, {self.part}"


def refused(error: Exception) -> str:
    """The outcome of a case that was refused; raises Wrong unless the refusal is one readable sentence."""
    text = str(error)
    if not text.strip() or len(text.splitlines()) != 1 or len(text) > LONGEST or "Traceback" in text:
        raise Wrong(f"not one sentence of at most {LONGEST} characters", f"{type(error).__name__} {text[:300]!r}") from error
    return REFUSED


def sentence_or(run: Callable[[], str]) -> str:
    """The outcome of a run that may be refused."""
    try:
        return run()
    except (InputError, RunError) as error:
        return refused(error)


def describe_finding(error: BaseException) -> dict[str, Any]:
    """What is kept of an exception. key: the same for findings of one cause."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _ours(frame.filename)]
    at = next((frame for frame in reversed(ours) if "bench/fuzz" not in frame.filename), ours[-1] if ours else frames[-1])
    if isinstance(error, Wrong) and isinstance(error.__cause__, Exception):  # the refusal's own place
        return describe_finding(error.__cause__) | {"message": str(error)[:500]}
    where = f"{Path(at.filename).relative_to(ROOT) if _ours(at.filename) else at.filename}:{at.name}"
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    said = error.what if isinstance(error, Wrong) else ""
    return {"key": " ".join(filter(None, [type(error).__name__, where, said])), "message": str(error)[:500], "traceback": "".join(lines)[-4000:]}


def _ours(file: str) -> bool:
    return file.startswith(f"{ROOT}/") and "/.venv/" not in file
