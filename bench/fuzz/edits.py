"""Damage to one file as data: a list of edits, each a list of a name and plain arguments, applied to the bytes of a sound file.

An edit whose place is not there (an offset behind the end, a key that an earlier edit dropped) takes the nearest, or does nothing.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import payloads

TYPES = (
    "null", "true", "0", "-1", "1.5", '""', '"x"', "[]", "{}", "[1]", "[null]", '{"a": 1}', '[["x"]]', '"\\ud800"', '"\\u0000"',
    '"../x"', '"/etc/passwd"',
)  # fmt: skip
NUMBERS = (
    "0", "-1", "1", "2", "1.5", "-0.0", "NaN", "Infinity", "-Infinity", "1e999", "1e308", "-1e308", "5e-324", "255", "65536", "2147483647",
    "2147483648", "-2147483649",
    "4294967296", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616", '"3"', "true", "[3]",
)  # fmt: skip
LARGE = {
    "many digits": "1" + "0" * 400,
    "too many digits": "1" + "0" * 5000,
    "long text": '"' + "x" * 1_000_000 + '"',
    "deep list": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 5000 + "1" + "}" * 5000,
    "long list": "[" + "1," * 100_000 + "1]",
}
SIZES = ("1000000", "1000000000", "1000000000000", "9007199254740993", *LARGE)
INTEGERS = (0, 1, 2, 7, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
PATTERNS = ("0000c07f", "0000807f", "000080ff", "ffffff7f", "01000000", "ffffffff", "00000080", "ffffffffffffff7f", "000000000000f87f")  # floats
FORMS = ("missing", "empty", "directory", "fifo", "endless", "loop", "dangling", "nul", "spaces", "json text", "text")
HEADERS = {"bom": b"\xef\xbb\xbf", "nul": b"\0", "brackets": b"[" * 200_000, "zip": b"PK\x03\x04", "gzip": b"\x1f\x8b\x08", "space": b" " * 1000}


def damaged(data: bytes, edits: list[list]) -> bytes | str:
    """The bytes after the edits; a name of FORMS where the file is to become something else."""
    for name, *arguments in edits:
        if name == "form":
            return arguments[0]
        data = EDITS[name](data, *arguments)
    return data


def write(path: Path, content: bytes | str) -> None:
    """Put the damaged file in its place."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    plain = {"empty": b"", "nul": bytes(100), "spaces": b" " * 100, "json text": b'"text"', "text": b"not what it should be\n"}
    if isinstance(content, bytes) or content in plain:
        path.write_bytes(content if isinstance(content, bytes) else plain[content])
    elif content == "directory":
        path.mkdir()
    elif content == "fifo":
        os.mkfifo(path)
    elif content != "missing":
        path.symlink_to({"endless": "/dev/zero", "loop": path.name, "dangling": "nothing"}[content])


def _flip(data: bytes, at: int, bit: int) -> bytes:
    if not data:
        return data
    at %= len(data)
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def _overwrite(data: bytes, at: int, new: bytes) -> bytes:
    at = min(at, len(data))
    return data[:at] + new[: len(data) - at] + data[at + len(new) :]


def _number(data: bytes, at: int, width: int, order: str, value: int) -> bytes:
    return _overwrite(data, at, (value % 2 ** (8 * width)).to_bytes(width, order))  # type: ignore[arg-type]


def _text_number(data: bytes, at: int, width: int, text: str) -> bytes:
    return _overwrite(data, at, text.encode()[:width].ljust(width, b"\0"))


def _json(data: bytes, path: list, token: str) -> bytes:
    """The JSON value at a path replaced by a token, which need not be JSON."""
    return _at(data, path, lambda holder, key: holder.__setitem__(key, "@token@"), LARGE.get(token, token))


def _json_drop(data: bytes, path: list) -> bytes:
    return _at(data, path, lambda holder, key: holder.__delitem__(key))


def _json_rename(data: bytes, path: list, name: str) -> bytes:
    def rename(holder: Any, key: Any) -> None:
        if isinstance(holder, dict):
            holder[name] = holder.pop(key)

    return _at(data, path, rename)


def _json_repeat(data: bytes, path: list, times: int) -> bytes:
    def repeat(holder: Any, key: Any) -> None:
        if isinstance(holder, list):
            holder[key:key] = [holder[key]] * times
        elif isinstance(holder[key], list | str):
            holder[key] = holder[key] * times

    return _at(data, path, repeat)


def _at(data: bytes, path: list, change: Callable[[Any, Any], object], token: str = "") -> bytes:
    try:
        content = [json.loads(data)]
        holder, key = content, 0
        for step in path:
            holder, key = holder[key], step  # type: ignore[assignment]
        change(holder, key)
        return json.dumps(content[0]).replace('"@token@"', token).encode() if content else b""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return data


def split_header(data: bytes) -> tuple[bytes, bytes]:
    """The JSON header of a safetensors file, and what follows it."""
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def _header(data: bytes, edit: list) -> bytes:
    """An edit of the JSON header of a safetensors file, whose length is set anew."""
    header, rest = split_header(data)
    header = EDITS[edit[0]](header, *edit[1:])
    return struct.pack("<Q", len(header)) + header + rest


def _metadata(data: bytes, name: str, edit: list) -> bytes:
    """An edit of JSON that a safetensors file holds as text in its metadata."""
    header, rest = split_header(data)
    try:
        held = json.loads(header)
        held["__metadata__"][name] = EDITS[edit[0]](held["__metadata__"][name].encode(), *edit[1:]).decode(errors="replace")
    except (ValueError, KeyError, TypeError, AttributeError):
        return data
    header = json.dumps(held).encode()
    return struct.pack("<Q", len(header)) + header + rest


def _zip_entry(data: bytes, entry: str, content: str) -> bytes:
    try:
        return payloads.rezipped(data, entry, payloads.pickles()[content])
    except Exception:  # of an archive that an earlier edit damaged
        return data


EDITS: dict[str, Callable[..., bytes]] = {
    "flip": _flip,
    "byte": lambda data, at, value: _overwrite(data, at % max(1, len(data)), bytes([value])),
    "cut": lambda data, length: data[:length],
    "drop": lambda data, at, count: data[:at] + data[at + count :],
    "insert": lambda data, at, text: data[:at] + bytes.fromhex(text) + data[at:],
    "zero": lambda data, at, count: _overwrite(data, at, bytes(count)),
    "append": lambda data, count: data + data[:count] if count < 256 else data + bytes(count),
    "twice": lambda data: data + data,
    "pattern": lambda data, at, text: _overwrite(data, at, bytes.fromhex(text)),
    "number": _number,
    "text number": _text_number,
    "prefix": lambda data, name: HEADERS[name] + data,
    "over": lambda data, name: _overwrite(data, 0, HEADERS[name]),
    "recode": lambda data, code: data.decode("utf-8", "replace").encode(code, "replace"),
    "content": lambda data, name: payloads.contents()[name],
    "zip entry": _zip_entry,
    "json": _json,
    "json drop": _json_drop,
    "json rename": _json_rename,
    "json repeat": _json_repeat,
    "header": _header,
    "metadata": _metadata,
}
