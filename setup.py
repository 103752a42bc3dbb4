"""The parts of packaging that need code: `kernels/` and `csrc/` are installed as `smi.kernels` and `smi.csrc`, and the CUDA library is built where it
can be. Everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import __version__ as installed
from setuptools import find_packages, setup

OLDEST_SETUPTOOLS = 77  # the first that reads `license = "MIT"` of pyproject.toml
if int(installed.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(f"smi: building needs setuptools {OLDEST_SETUPTOOLS} or later, this is {installed}: pip install --upgrade setuptools")

sys.path.insert(0, str(Path(__file__).parent))

from csrc import build  # noqa: E402

extensions = build.extensions()

setup(
    package_dir={"smi": "smi", "smi.kernels": "kernels", "smi.csrc": "csrc"},
    packages=[
        "smi",
        *(f"smi.{name}" for name in find_packages("smi")),
        "smi.kernels",
        *(f"smi.kernels.{name}" for name in find_packages("kernels")),
        "smi.csrc",
    ],
    package_data={
        "smi": ["py.typed"],
        "smi.teachers": ["*.safetensors", "*.json"],
        "smi.report": ["*.html"],
        "smi.kernels": ["verified.json", "tiles/*.json"],
        "smi.csrc": build.SHIPPED,
    },
    ext_modules=extensions,
    cmdclass=build.commands(),
    options=build.options(extensions),
)
