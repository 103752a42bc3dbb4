"""Makes kernels/verified.json, which ships with the package, from the verdicts in the committed result files.

    python -m bench.tables.verified            rewrite it
    python -m bench.tables.verified --check    exit 1 if it is not what the result files give

For each GPU architecture it lists verdicts: a raw function of an operation, version, dtype and class of sizes, whether the results were correct, and
the speed over stock PyTorch; and what made the machine code that was run: Triton, ptxas, a digest of the sources. Where a verdict says correct and
faster, and the same would run, `smi.kernels.dispatch` chooses that version on such a GPU without a check of its own.
"""

import argparse
import json
import sys

from smi.files import write_json
from smi.kernels import verdicts

from .rows import read_all


def table(rows: list[dict]) -> dict:
    """The last verdict on every key for every architecture and machine code. A verdict from uncommitted code does not count, nor does a crash, which
    another run may not have, nor a row without a key of today's."""
    last: dict[str, dict[tuple, dict]] = {}
    fields = (*verdicts.COMPILED_BY, *verdicts.Verdict._fields)
    for row in rows:
        if row.get("kind") == "verdict" and not row["dirty"] and all(field in row for field in fields):
            found = {field: row[field] for field in fields}
            if verdicts.from_row(found).lasting:
                last.setdefault(row["architecture"], {})[tuple(found[name] for name in (*verdicts.COMPILED_BY, *verdicts.Key._fields))] = found
    return {"architectures": {arch: [mine[key] for key in sorted(mine)] for arch, mine in sorted(last.items())}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args(arguments).check
    made = table(read_all())
    if check:
        same = json.loads(verdicts.VERIFIED.read_text()) == made
        print(f"{verdicts.VERIFIED.name} is " + ("as the result files give" if same else "out of date: run python -m bench.tables.verified"))
        return 0 if same else 1
    write_json(verdicts.VERIFIED, made)
    print(f"wrote {verdicts.VERIFIED}: {sum(map(len, made['architectures'].values()))} verdicts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
