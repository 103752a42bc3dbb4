"""Render the measured tables of all documents from the rows in bench/results.

    python -m bench.tables            write them (make tables)
    python -m bench.tables --check    write nothing; exit code 1 where a table differs from its rows, with its name
    python -m bench.tables --unread   list rows that no table reads; exit code 1 where there are any
    python -m bench.tables --list     the names of the tables
    python -m bench.tables --picture  draw bench/results/evidence-imagenet.png from the rows

In a document a table stands between two lines, and what is between them is replaced:

    <!-- table: NAME (make tables) -->
    <!-- end of table -->

bench/results/paper.md is made again as a whole. Its pictures are drawn by `python -m bench.paper`.
"""

import argparse
import sys

from smi.console import print_table
from smi.errors import InputError
from smi.files import write_text

from ..measuring import record
from ..measuring.record import ROOT
from .documents import TABLES, documents, rendered, unread
from .markdown import Rendered
from .plots import plot_iterations
from .rows import processor, read_all


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a table differs")
    one.add_argument("--unread", action="store_true", help="list rows that no table reads")
    one.add_argument("--list", action="store_true", help="list the tables")
    one.add_argument("--picture", action="store_true", help="draw accuracy against iterations on ImageNet")
    given = parser.parse_args(arguments)
    if given.list:
        print_table("tables", ["name", "what it shows"], [[name, make.__doc__] for name, make in TABLES.items()])
        return 0
    if given.picture:
        return 0 if plot_iterations(read_all(), record.RESULTS / "evidence-imagenet.png") else 1
    return _unread() if given.unread else _render(write=not given.check)


def _render(write: bool) -> int:
    rows, different, refused = read_all(), 0, 0
    for path in documents(ROOT):
        name = path.relative_to(ROOT)
        try:
            made = rendered(path, rows)
        except InputError as error:
            made = Rendered("", [], [str(error)])
        for reason in made.refused:
            print(f"{name}: {reason}", file=sys.stderr)
        for table in made.changed:
            print(f"{name}: the table {table} " + ("is rendered" if write else "differs from the rows: run make tables"))
        if made.changed and write:
            write_text(path, made.text)
        different, refused = different + len(made.changed), refused + len(made.refused)
    return 1 if refused or (different and not write) else 0


def _unread() -> int:
    found = unread(read_all())
    for row in found:
        print(f"{row.get('kind')} {row.get('case', row.get('model', ''))}, {row.get('side', '')}, {processor(row)}, commit {row['commit'][:7]}")
    print(f"{len(found)} rows that no table reads")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
