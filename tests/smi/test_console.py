"""Tables where rich is not installed."""

from smi import console


def test_table_without_rich_has_the_same_cells():
    text = console.plain_table("title", ["name", "n"], [["a", "1"], ["bb", "22"]])
    assert text.splitlines() == ["title", "name   n", "a      1", "bb    22"]
