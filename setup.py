"""The parts of packaging that need code: `kernels/` is installed as `smi.kernels`. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    package_dir={"smi": "smi", "smi.kernels": "kernels"},
    packages=[
        "smi",
        *(f"smi.{name}" for name in find_packages("smi")),
        "smi.kernels",
        *(f"smi.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_data={"smi.teachers": ["*.safetensors", "*.json"]},
)
