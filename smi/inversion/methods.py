"""The methods that demo, reports and benchmarks compare, as data: names, settings, titles and the order of rows."""

from dataclasses import dataclass
from typing import Any

NAMES = {"dense": "dense", "smi": "SMI", "pri": "PRI", "psaq": "PSAQ-ViT", "gaussian": "Gaussian noise", "real": "real images"}
HEADINGS = {  # of "... inversion of MODEL"
    "dense": "Dense", "smi": "Sparse (SMI)", "pri": "Patch rebirth (PRI)", "psaq": "PSAQ-ViT", "gaussian": "Gaussian noise, no",
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A row of a comparison: a method of `smi.invert` with the settings that tell it from other rows, or real images as a control."""

    name: str
    division: int | None = None  # images per trajectory of PRI
    importance: str | None = None  # None: the default

    @property
    def options(self) -> dict[str, Any]:
        """Settings of `smi.invert` beside the method's name."""
        given = {"division": self.division, "importance": self.importance}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def title(self) -> str:
        """For example "SMI", "PRI v=4", "PRI v=4, random"."""
        title = NAMES[self.name] if self.division is None else f"{NAMES[self.name]} v={self.division}"
        return title if self.importance is None else f"{title}, {self.importance}"

    @property
    def key(self) -> str:
        """The name in files and folders: for example "smi", "pri4", "pri4-random"."""
        key = self.name if self.division is None else f"{self.name}{self.division}"
        return key if self.importance is None else f"{key}-{self.importance}"

    @property
    def optimised(self) -> bool:
        """Whether iterations are spent on its images."""
        return self.name not in ("gaussian", "real")


DENSE, SMI, PSAQ, GAUSSIAN, REAL = map(Method, ("dense", "smi", "psaq", "gaussian", "real"))
PRI2, PRI4, PRI7 = (Method("pri", division) for division in (2, 4, 7))
COMPARED = (DENSE, SMI, PRI2, PRI4, PRI7)  # in speed
JUDGED = (GAUSSIAN, DENSE, PSAQ, SMI, PRI2, PRI4, PRI7, REAL)  # by what their images are worth; in the order of the papers' tables
