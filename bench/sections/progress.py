"""What a measurement has done so far: a file of rows, each a section, a part of it or one of its cases that was begun or came to its end.

{"call", "code", "section", "part", "case", "state", "time", ...}; a row without a case is about the part as a whole. What another call finished is
finished here too, as long as it measured the same code.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..measuring import rows_file

BEGUN = "begun"
FINISHED = "finished"
FAILED = "failed"  # it raised an error, and the others went on
CRASHED = "crashed"  # its process died
CUT = "cut"  # its process was ended at its limit
NOT_AGAIN = (FINISHED, FAILED, CRASHED)  # by the same code; what was only begun, or cut, is tried again, after all others


class Key(NamedTuple):
    """A part of a section, or one of its cases."""

    section: str
    part: str
    case: str | None = None


class Progress:
    """path: the file. code: digest of the code that is measured. call: which run of the command. earlier: files of other calls, only read."""

    def __init__(self, path: Path, code: str, call: str, earlier: Iterable[Path] = ()):
        self.path, self.code, self.call, self.earlier = path, code, call, tuple(earlier)

    def mark(self, key: Key, state: str, **more: object) -> None:
        about = {"call": self.call, "code": self.code, **key._asdict(), "state": state, "time": round(time.time(), 3)}
        rows_file.append(self.path, [about | more])

    def rows(self) -> list[dict]:
        """Of this code, those of earlier files first."""
        return [row for path in (*self.earlier, self.path) for row in rows_file.read(path) if row["code"] == self.code]

    def states(self) -> dict[Key, str]:
        """The last state of everything that was begun."""
        return {key_of(row): row["state"] for row in self.rows()}

    def open_case(self, section: str, part: str) -> str | None:
        """The case that this call has begun and that came to no end."""
        mine = [row for row in self.rows() if row["call"] == self.call and (row["section"], row["part"]) == (section, part) and row["case"]]
        return mine[-1]["case"] if mine and mine[-1]["state"] == BEGUN else None

    def order(self, section: str, part: str, cases: Iterable[str]) -> list[str]:
        """The cases that are left to do: those never tried first, then those that an earlier call began."""
        states = self.states()
        left = [case for case in cases if states.get(Key(section, part, case)) not in NOT_AGAIN]
        return sorted(left, key=lambda case: Key(section, part, case) in states)


def key_of(row: dict) -> Key:
    return Key(row["section"], row["part"], row["case"])
