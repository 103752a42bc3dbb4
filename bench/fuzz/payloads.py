"""Content that is no data: pickles that make a folder when they are read, archives around them, and files that unpack to far more than they take."""

import io
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

MARK = "EXECUTED"  # the folder that a payload makes in the working directory
BOMB = 768 * 2**20  # bytes that a bomb unpacks to


class _Calls:
    """Pickled as a call."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def pickles() -> dict[str, bytes]:
    """Pickles that run code, by the way in which they do."""
    calls = {
        "mkdir": _Calls(os.mkdir, MARK),
        "system": _Calls(os.system, f"mkdir {MARK}"),
        "exec": _Calls(exec, f"import os; os.mkdir({MARK!r})"),
        "eval": _Calls(eval, f"__import__('os').mkdir({MARK!r})"),
        "path": _Calls(Path.mkdir, Path(MARK)),
    }
    made = {f"{name} {protocol}": pickle.dumps({"weight": call}, protocol) for name, call in calls.items() for protocol in (0, 2, 4)}
    made["inst"] = f"(S'{MARK}'\nios\nmkdir\n.".encode()
    made["build"] = f"ccollections\nOrderedDict\n)R(dS'x'\ncos\nmkdir\n(S'{MARK}'\ntRsb.".encode()
    made["stack global"] = b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93\x8c" + bytes([len(MARK)]) + MARK.encode() + b"\x85R."
    made["nested"] = b"(" * 100_000 + b"t" * 100_000 + b"."
    made["memo"] = b"\x80\x02" + b"]q\x00" + b"h\x00a" * 1000 + b"."
    made["long"] = b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x00."
    made["string"] = b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"."
    return made


def rezipped(archive: bytes, entry: str, content: bytes) -> bytes:
    """A zip with the content of the entries whose name ends so replaced."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith(entry) else old.read(name))
    return made.getvalue()


def legacy(content: bytes) -> bytes:
    """torch.save's format before it was a zip, with `content` in the place of the object's pickle."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}]
    return b"".join(pickle.dumps(part, 2) for part in head) + content + pickle.dumps([], 2)


def tar(files: dict[str, bytes], link: str | None = None) -> bytes:
    """A tar of files; link: one more entry, a symbolic link that leads there."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
        if link is not None:
            about = tarfile.TarInfo("link")
            about.type, about.linkname = tarfile.SYMTYPE, link
            archive.addfile(about)
    return made.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    """A zip of files, stored."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


@cache
def zip_bomb() -> bytes:
    """A checkpoint whose pickle unpacks to BOMB zeros."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as file:
            for _ in range(BOMB // 2**20):
                file.write(bytes(2**20))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return made.getvalue()


def picture_bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has these sides."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            chunk(b"IDAT", zlib.compress(bytes(1 << 20))),
            chunk(b"IEND", b""),
        ]
    )


@cache
def contents() -> dict[str, bytes]:
    """Whole files by name."""
    made = {f"pickle {name}": content for name, content in pickles().items()}
    first = pickles()["mkdir 2"]
    entry = {"archive/data.pkl": first, "archive/version": b"3\n", "archive/byteorder": b"little"}
    made |= {f"zip {name}": zip_of(entry | {"archive/data.pkl": content}) for name, content in pickles().items()}
    made |= {f"legacy {name}": legacy(content) for name, content in pickles().items()}
    code = f"import os\nos.mkdir({MARK!r})\n".encode()
    made["torchscript"] = zip_of(entry | {"archive/constants.pkl": first, "archive/code/__torch__.py": code})
    made["pt2"] = zip_of({"archive/archive_format": b"pt2", "archive/data/sample_inputs/model.pt": zip_of(entry), "archive/models/model.json": b"{}"})
    made["zip outside"] = zip_of(entry | {"../../outside": b"x", "/tmp/outside": b"x"})
    made["zip twice"] = zip_of(entry) + zip_of(entry)
    made["tar"] = tar({"pickle": first, "storages": first, "tensors": first})
    made["tar outside"] = tar({"../outside": b"x", "storages": first}, link="/etc")
    made["npy object"] = _object_array()
    made["zip bomb"] = zip_bomb()
    for width, height in ((10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (0, 0)):
        made[f"png {width}x{height}"] = picture_bomb(width, height)
    return made


def _object_array() -> bytes:
    import numpy as np

    made = io.BytesIO()
    np.save(made, np.array([_Calls(os.mkdir, MARK)], dtype=object), allow_pickle=True)
    return made.getvalue()
