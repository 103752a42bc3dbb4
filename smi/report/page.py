"""The page as data, and how it becomes one HTML file: pictures are embedded, nothing is fetched."""

import base64
import datetime
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from ..version import __version__

MARK = '<meta name="generator" content="smi report">'  # tells our own page from a user's file


@dataclass(frozen=True)
class Figure:
    """A picture with a plain sentence that says what is seen."""

    path: Path  # a PNG
    caption: str
    alt: str

    kind = "figure"

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()

    @property
    def size(self) -> tuple[int, int]:
        """Pixels: width, height."""
        from PIL import Image

        with Image.open(self.path) as picture:
            return picture.size


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names them."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    words: bool = False  # the cells are words, not figures

    kind = "table"


@dataclass(frozen=True)
class Details:
    """Parts that are folded away until they are asked for."""

    title: str
    parts: Sequence["Part"]

    kind = "details"


@dataclass(frozen=True)
class Pair:
    """Figures side by side where there is room."""

    figures: Sequence[Figure]

    kind = "pair"


@dataclass(frozen=True)
class Heading:
    """A title within a section."""

    title: str

    kind = "heading"


Part = str | Figure | Pair | Table | Details | Heading  # a str is a paragraph


@dataclass(frozen=True)
class Section:
    """A chapter of the page; one without parts is left out."""

    title: str
    parts: list[Part] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """The name by which links find it."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def render(title: str, summary: str, sections: Sequence[Section]) -> str:
    """The HTML file."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    chosen = [section for section in sections if section.parts]
    return template.render(title=title, summary=summary, sections=chosen, made=made, version=__version__)


def number(value: float | None, digits: int = 1, suffix: str = "") -> str:
    """A figure of a table; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}{suffix}"


def per_cent(value: float | None, digits: int = 1) -> str:
    """A fraction as per cent."""
    return number(None if value is None else 100 * value, digits, "\u00a0%")


def factor(value: float | None) -> str:
    """A ratio of speeds."""
    return number(value, 2, "×")
