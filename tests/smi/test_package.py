"""What is stated in two places agrees."""

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import smi

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]


def test_version_is_the_same_everywhere():
    stated = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    assert smi.__version__ == stated
    assert f"version: {stated}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {stated}" in (ROOT / "CHANGELOG.md").read_text()


def test_everything_exported_exists():
    assert all(hasattr(smi, name) for name in smi.__all__)


def test_an_old_setuptools_is_told_what_is_needed_in_one_line():
    pytest.importorskip("setuptools")
    (oldest,) = re.findall(r"setuptools>=(\d+)", (ROOT / "pyproject.toml").read_text())
    code = "import runpy, setuptools; setuptools.__version__ = '68.2.2'; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"smi: building needs setuptools {oldest} or later, this is 68.2.2: pip install --upgrade setuptools"]


def test_a_checkout_adds_kernels_and_csrc_alone():
    """Neither tests nor a second smi become part of the package, and walking it ends."""
    names = {module.name for module in pkgutil.iter_modules(smi.__path__)}
    assert not names & {"smi", "tests", "bench", "conftest", "setup"}
    assert smi.kernels.__name__ == "smi.kernels"
    assert smi.csrc.__name__ == "smi.csrc"
