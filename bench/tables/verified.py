"""Makes kernels/verified.json, which ships with the package, from the verdicts in the committed result files.

    python -m bench.tables.verified            rewrite it
    python -m bench.tables.verified --check    exit 1 if it is not what the result files give

For each GPU architecture it lists verdicts: an operation, version, dtype and class of sizes, whether the results were correct, and the speed
over stock PyTorch. Where a verdict says correct and faster, `smi.kernels.dispatch` chooses that version on such a GPU without a check of its own.
"""

import argparse
import json
import sys

from smi.files import write_json
from smi.kernels import verification

from .rows import read_all


def table(rows: list[dict]) -> dict:
    """The last verdict for every architecture, operation, version, dtype and class of sizes. A verdict from uncommitted code does not count."""
    last: dict[str, dict[tuple, dict]] = {}
    for row in rows:
        if row.get("kind") == "verdict" and not row["dirty"]:
            verdict = verification.Verdict(**{field: row[field] for field in verification.Verdict._fields})
            last.setdefault(row["architecture"], {})[verdict[:4]] = verdict._asdict()
    return {"architectures": {arch: [verdicts[key] for key in sorted(verdicts)] for arch, verdicts in sorted(last.items())}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args(arguments).check
    made = table(read_all())
    if check:
        same = json.loads(verification.VERIFIED.read_text()) == made
        print(f"{verification.VERIFIED.name} is " + ("as the result files give" if same else "out of date: run python -m bench.tables.verified"))
        return 0 if same else 1
    write_json(verification.VERIFIED, made)
    print(f"wrote {verification.VERIFIED}: {sum(map(len, made['architectures'].values()))} verdicts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
