"""Tables in the documents: as markdown, between a comment that names the table and the command that renders it, and one that ends it."""

import re
from collections.abc import Callable, Mapping, Sequence

from smi.errors import InputError

from .rows import measured_on
from .table import Table

BEGIN = re.compile(r"^<!-- table: (.*) \(make tables\) -->\n", re.MULTILINE)
END = "<!-- end of table -->"
Maker = Callable[[Sequence[dict]], list[Table]]  # rows of the result files -> tables of one name


def table_lines(table: Table) -> list[str]:
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    return lines + ["| " + " | ".join(line) + " |" for line in table.lines]


def as_markdown(tables: Sequence[Table]) -> str:
    """Tables of one name, each under a line that says where it was measured."""
    parts = []
    for table in tables:
        caption = ": ".join(filter(None, [table.title, f"measured on {measured_on(table.rows)}" if table.rows else ""]))
        parts.append("\n".join(([caption[0].upper() + caption[1:] + ".", ""] if caption else []) + table_lines(table)) + "\n")
    return "\n".join(parts)


def render(text: str, makers: Mapping[str, Maker], rows: Sequence[dict]) -> tuple[str, list[str]]:
    """A document with its tables made of the rows, and the names of those that differ from what it held; raises InputError for a marker that cannot
    be followed."""
    done, changed = "", []
    while begin := BEGIN.search(text):
        name, rest = begin[1], text[begin.end() :]
        table, end, after = rest.partition(END)
        if not end or BEGIN.search(table):
            raise InputError(f"the table {name} has no end: close it with {END}")
        made = as_markdown(make(name, makers, rows))
        changed += [name] if made != table else []
        done, text = done + text[: begin.end()] + made + END, after
    return done + text, changed


def make(name: str, makers: Mapping[str, Maker], rows: Sequence[dict]) -> list[Table]:
    """The tables of a name; raises InputError where there is none of that name, or nothing was measured for it."""
    if name not in makers:
        raise InputError(f"there is no table {name}: choose one of {', '.join(makers)}")
    tables = makers[name](rows)
    if not any(table.lines for table in tables):
        raise InputError(f"the table {name} has no rows: nothing in bench/results was measured for it")
    return tables
