"""Does the executor notice? One instruction of a right program is broken at a time.

python -m bench.executor.planted [--case attention/bwd-n64/bf16-d64] [--most 3]     exit code 1 if a fault is noticed nowhere

What goes unnoticed is printed. Some of it is no fault: a barrier or a fence before which another lies is superfluous.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from unittest.mock import patch

from . import compiling
from .ptx.launch import load

FAULTS = {
    "no barrier": (r"^\s*bar\.sync.*", ""),
    "no proxy fence": (r"^(\s*)fence\.proxy[^;]*;", r"\1"),
    "no wgmma wait": (r"^\s*wgmma\.wait_group.*", ""),
    "no cp.async wait": (r"^\s*cp\.async\.wait_group.*", ""),
    "later cp.async wait": (r"^(\s*cp\.async\.wait_group\s+)0;", r"\g<1>1;"),
    "ldmatrix transposed": (r"^(\s*ldmatrix.*\.x\d)\.shared", r"\1.trans.shared"),
    "ldmatrix not transposed": (r"^(\s*ldmatrix.*\.x\d)\.trans", r"\1"),
    "B of wgmma transposed": (r"^(\s*wgmma\.mma_async.*), 0;", r"\1, 1;"),
    "B of wgmma not transposed": (r"^(\s*wgmma\.mma_async.*), 1;", r"\1, 0;"),
    "wrong mask": (r"^(\s*setp\.)(lt|gt)(\.s32\s+%p\d+, %r\d+, %r\d+;)", lambda m: f"{m[1]}{'le' if m[2] == 'lt' else 'ge'}{m[3]}"),
    "A of mma swapped": (r"^(\s*mma\.sync.*?\}, \{ ?)(%r\d+), ?(%r\d+)", r"\1\3, \2"),
    "shared store moved": (r"^(\s*(?:@%p\d+ )?st\.shared.*?\[\s*%r\d+)\s*\+\s*[1-9]\d*\s*\]", r"\1]"),
    "shuffle with itself": (r"^(\s*shfl\.sync\.bfly.*), (\d+), 31, -1", r"\1, 0, 31, -1"),
}


def broken(text: str, fault: str, most: int) -> Iterator[tuple[str, str]]:
    """(the line, the text with it broken) for the first lines that a fault can be planted in."""
    pattern, new = FAULTS[fault]
    lines = text.splitlines()
    for i, line in enumerate(lines):
        changed = re.sub(pattern, new, line)
        if changed != line and most:
            most -= 1
            yield f"line {i + 1}: {line.strip()[:100]}", "\n".join([*lines[:i], changed, *lines[i + 1 :]])


def noticed(name: str, text: str, architecture: int) -> bool:
    """Whether executing the work of a compile case finds something wrong when the case's program is this text."""
    from .operations import works
    from .run import cases_for, execute

    operation = name.split("/")[0]
    cases = cases_for(operation, architecture)
    work = next(work for work in works(operation, cases) if name in work.cases)
    built = compiling.build_case

    def build_case(case, architecture: int) -> compiling.Compiled:
        made = built(case, architecture)
        return compiling.Compiled(load(text), text, made.binary, made.shared) if case.name == name else made

    with patch("bench.executor.interposer.build_case", build_case):
        return bool(execute(work, architecture, cases).wrong)


def main(arguments: list[str] | None = None) -> int:
    from .run import cases_for

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="attention/bwd-n64/bf16-d64", help="name of a compile case")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--most", type=int, default=3, help="places for each fault")
    options = parser.parse_args(arguments)
    case = next(case for case in cases_for(options.case.split("/")[0], options.arch) if case.name == options.case)
    right = compiling.build_case(case, options.arch).text
    if noticed(case.name, right, options.arch):
        print(f"{case.name} is wrong with nothing planted")
        return 1
    missed = False
    for fault in options.only:
        tried = [(line, noticed(case.name, text, options.arch)) for line, text in broken(right, fault, options.most)]
        if tried:
            print(f"{fault}: noticed in {sum(found for _, found in tried)} of {len(tried)} places", flush=True)
            missed |= not any(found for _, found in tried)
        for line, found in tried:
            if not found:
                print(f"    unnoticed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
