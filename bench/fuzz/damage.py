"""Which damage is done to which format: for each kind of damage a function that draws the edits of a case."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from . import payloads
from .draw import Draw
from .edits import FORMS, HEADERS, INTEGERS, NUMBERS, PATTERNS, SIZES, TYPES, split_header

Edits = list[list]
DAMAGES = ("bits", "truncation", "header", "length", "offset", "payload", "type", "numbers", "sizes")
DTYPES = ("F32", "F64", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "I128", "")


class Anatomy:
    """What can be aimed at in a sound file. fields: (offset, bytes, order) of its lengths and offsets; paths: of all its JSON values."""

    def __init__(self, form: str, data: bytes):
        self.form, self.data = form, data
        self.lengths, self.offsets = FIELDS.get(form, lambda data: ([], []))(data)
        self.tensors = form == "safetensors"
        self.header: Any = json.loads(split_header(data)[0]) if self.tensors else json.loads(data) if form == "json" else None
        self.paths = list(_paths(self.header)) if self.header is not None else []
        self.metadata = [(name, list(_paths(json.loads(text)))) for name, text in self._metadata() if _is_json(text)]

    def _metadata(self) -> Iterable[tuple[str, str]]:
        return self.header.get("__metadata__", {}).items() if self.tensors else ()

    def damages(self) -> list[str]:
        """The kinds of damage that there are for this format."""
        without = set()
        if not (self.lengths or self.paths):
            without.add("length")
        if not (self.offsets or self.tensors):
            without.add("offset")
        return [damage for damage in DAMAGES if damage not in without]

    def make(self, damage: str, draw: Draw) -> Edits:
        """The edits of one case."""
        return getattr(self, f"_{damage}")(draw)

    def _place(self, draw: Draw) -> int:
        """An offset: anywhere, near the beginning, near the end."""
        size = max(1, len(self.data))
        near = draw.choice(("anywhere", "begin", "end"))
        return draw.below(size) if near == "anywhere" else draw.below(min(64, size)) if near == "begin" else size - 1 - draw.below(min(64, size))

    def _bits(self, draw: Draw) -> Edits:
        edits = []
        for _ in range(draw.integer(1, 6)):
            at = self._place(draw)
            edits.append(["flip", at, draw.below(8)] if draw.chance(2) else ["byte", at, draw.choice((0, 255, 127, 128, 10, 34, 91, 123))])
        return edits

    def _truncation(self, draw: Draw) -> Edits:
        at, count = self._place(draw), draw.choice((1, 2, 7, 8, 64, 4096))
        cuts = ["cut", at], ["drop", at, count], ["zero", at, count]
        return [draw.choice((*cuts, ["append", count], ["twice"], ["insert", at, "00" * min(count, 64)]))]

    def _header(self, draw: Draw) -> Edits:
        if self.paths and draw.chance(2):
            path = self._path(draw)
            edit = draw.choice((["json drop", path], ["json rename", path, draw.choice(("x", "", "format", "__metadata__", "é"))]))
            return [self._in_header(edit)]
        name = draw.choice(list(HEADERS))
        return [draw.choice((["prefix", name], ["over", name], ["recode", draw.choice(("utf-16", "utf-7", "latin-1"))]))]

    def _length(self, draw: Draw) -> Edits:
        if self.lengths and (not self.paths or draw.chance(2)):
            return self._integer(draw, self.lengths)
        return [self._in_header(["json repeat", self._path(draw), draw.choice((2, 0, 3, 50))])]

    def _offset(self, draw: Draw) -> Edits:
        if not self.tensors:
            return self._integer(draw, self.offsets)
        places = [path for path in self.paths if "data_offsets" in path] or self.paths
        return [["header", ["json", draw.choice(places), draw.choice([*NUMBERS, "[0, 0]", "[4, 0]", "[0, 99999999]"])]]]

    def _payload(self, draw: Draw) -> Edits:
        if self.form == "zip" and draw.chance(2):
            return [["zip entry", draw.choice(("data.pkl", "version", "byteorder", "data/0")), draw.choice(list(payloads.pickles()))]]
        return [["content", draw.choice(list(payloads.contents()))]]

    def _type(self, draw: Draw) -> Edits:
        if not self.paths or draw.chance(4):
            return [["form", draw.choice(FORMS)]]
        if self.tensors and draw.chance(2):
            path = draw.choice([path for path in self.paths if path[-1:] in (["dtype"], ["shape"])] or self.paths)
            token = json.dumps(draw.choice(DTYPES)) if path[-1:] == ["dtype"] else draw.choice(("[]", "[0]", "[1]", "[-1]", "[1, 1]"))
            return [["header", ["json", path, token]]]
        return [self._somewhere(draw, TYPES)]

    def _numbers(self, draw: Draw) -> Edits:
        if self.tensors and draw.chance(2):
            start = len(self.data) - len(split_header(self.data)[1])
            places = [min(len(self.data) - 1, start + 4 * draw.below(max(1, (len(self.data) - start) // 4))) for _ in range(draw.integer(1, 4))]
            return [["pattern", at, draw.choice(PATTERNS)] for at in places]
        if self.paths:
            return [self._somewhere(draw, NUMBERS) for _ in range(draw.integer(1, 2))]
        fields = [*self.lengths, *self.offsets]
        return self._integer(draw, fields) if fields else [["pattern", self._place(draw), draw.choice(PATTERNS)]]

    def _sizes(self, draw: Draw) -> Edits:
        if self.paths:
            return [self._somewhere(draw, SIZES)]
        if self.lengths and draw.chance(2):
            return self._integer(draw, self.lengths)
        return [["content", draw.choice([name for name in payloads.contents() if "bomb" in name or "png" in name])]]

    def _integer(self, draw: Draw, fields: list[tuple]) -> Edits:
        at, width, order = draw.choice(fields)
        if order == "octal":
            return [["text number", at, width, draw.choice(("0", "7" * width, "-1", "x", "77777777777", " "))]]
        held = int.from_bytes(self.data[at : at + width], order)
        return [["number", at, width, order, draw.choice((*INTEGERS, held + 1, max(0, held - 1), held * 2, len(self.data)))]]

    def _path(self, draw: Draw) -> list:
        return draw.choice(self.paths)

    def _in_header(self, edit: list) -> list:
        return ["header", edit] if self.tensors else edit

    def _somewhere(self, draw: Draw, tokens: tuple[str, ...]) -> list:
        """A value replaced: of the JSON, of the header, or of JSON in the header's metadata."""
        if self.metadata and draw.chance(2):
            name, paths = draw.choice(self.metadata)
            return ["metadata", name, ["json", draw.choice(paths), draw.choice(tokens)]]
        return self._in_header(["json", self._path(draw), draw.choice(tokens)])


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _paths(value: Any, here: tuple = ()) -> Iterable[list]:
    """The paths of a JSON value and of all values in it."""
    yield list(here)
    items: Iterable[tuple] = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, part in items:
        yield from _paths(part, (*here, key))


Fields = tuple[list[tuple], list[tuple]]  # lengths and offsets


def _found(data: bytes, mark: bytes) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(mark), data)]


def _of_zip(data: bytes) -> Fields:
    lengths, offsets = [], []
    for at in _found(data, b"PK\x03\x04"):
        lengths += [(at + 18, 4, "little"), (at + 22, 4, "little"), (at + 26, 2, "little"), (at + 28, 2, "little")]
    for at in _found(data, b"PK\x01\x02"):
        lengths += [(at + 20, 4, "little"), (at + 24, 4, "little"), (at + 28, 2, "little"), (at + 30, 2, "little")]
        offsets += [(at + 42, 4, "little"), (at + 10, 2, "little")]
    for at in _found(data, b"PK\x05\x06"):
        lengths += [(at + 8, 2, "little"), (at + 10, 2, "little"), (at + 12, 4, "little")]
        offsets.append((at + 16, 4, "little"))
    return lengths, offsets


def _of_png(data: bytes) -> Fields:
    chunks = [at - 4 for name in (b"IHDR", b"IDAT", b"IEND") for at in _found(data, name)]
    return [(at, 4, "big") for at in chunks] + [(16, 4, "big"), (20, 4, "big")], []


def _of_jpeg(data: bytes) -> Fields:
    marks = [at for mark in (b"\xff\xe0", b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xda") for at in _found(data, mark)]
    return [(at + 2, 2, "big") for at in marks], []


def _of_parquet(data: bytes) -> Fields:
    footer = len(data) - 8
    return [(footer, 4, "little"), (max(0, footer - 40), 1, "little"), (4, 1, "little")], [(max(0, footer - at), 1, "little") for at in range(1, 200)]


def _of_elf(data: bytes) -> Fields:
    programs = int.from_bytes(data[32:40], "little")
    offsets = [(32, 8, "little"), (40, 8, "little"), (24, 8, "little")] + [(programs + 56 * i + 8, 8, "little") for i in range(4)]
    return [(54, 2, "little"), (56, 2, "little"), (60, 2, "little")] + [(programs + 56 * i + 32, 8, "little") for i in range(4)], offsets


FIELDS: dict[str, Callable[[bytes], Fields]] = {
    "safetensors": lambda data: ([(0, 8, "little")], []),
    "zip": _of_zip,
    "png": _of_png,
    "jpeg": _of_jpeg,
    "parquet": _of_parquet,
    "elf": _of_elf,
}
