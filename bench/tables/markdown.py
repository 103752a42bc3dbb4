"""Tables in the documents: as markdown, between a comment that names the table and the command that renders it, and one that ends it."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

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


class Rendered(NamedTuple):
    """A document with its tables made of the rows; the names of those that differ from what it held; why others stand as they were."""

    text: str
    changed: list[str]
    refused: list[str]


def render(text: str, makers: Mapping[str, Maker], rows: Sequence[dict]) -> Rendered:
    """Make the tables between their comments; raises InputError where a table has no end."""
    done, changed, refused = "", [], []
    while begin := BEGIN.search(text):
        name, rest = begin[1], text[begin.end() :]
        held, end, after = rest.partition(END)
        if not end or BEGIN.search(held):
            raise InputError(f"the table {name} has no end: close it with {END}")
        try:
            made = as_markdown(make(name, makers, rows))
        except InputError as error:
            made = held
            refused.append(str(error))
        changed += [name] if made != held else []
        done, text = done + text[: begin.end()] + made + END, after
    return Rendered(done + text, changed, refused)


def make(name: str, makers: Mapping[str, Maker], rows: Sequence[dict]) -> list[Table]:
    """The tables of a name; raises InputError where there is none of that name, or nothing was measured for it."""
    if name not in makers:
        raise InputError(f"there is no table {name}: choose one of {', '.join(makers)}")
    tables = makers[name](rows)
    if not any(table.lines for table in tables):
        raise InputError(f"the table {name} has no rows: nothing in bench/results was measured for it")
    return tables
