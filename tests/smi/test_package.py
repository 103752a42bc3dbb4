"""What is stated in two places agrees."""

import re
from pathlib import Path

import smi

ROOT = Path(__file__).parents[2]


def test_version_is_the_same_everywhere():
    stated = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    assert smi.__version__ == stated
    assert f"version: {stated}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {stated}" in (ROOT / "CHANGELOG.md").read_text()


def test_everything_exported_exists():
    assert all(hasattr(smi, name) for name in smi.__all__)
