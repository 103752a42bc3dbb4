"""What runs here: versions of the packages, devices, and the kernel versions that each operation can use."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .engine.dtype import why_dtype
from .kernels.dispatch import availability, known_verdicts
from .kernels.versions import backend
from .version import __version__

PACKAGES = ("torch", "triton", "timm")


def info_table() -> dict[str, Any]:
    """Versions, devices and kernel versions of this installation, as JSON."""
    cpu = {"device": "cpu", "name": processor(), "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    devices = [{**cpu, "dtype": why_dtype(torch.device("cpu"))}]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "device": f"cuda:{i}",
                "name": properties.name,
                "memory_gib": properties.total_memory / 2**30,
                "capability": f"sm_{properties.major}{properties.minor}",
                "dtype": why_dtype(torch.device("cuda", i)),
            }
        )
    return {
        "versions": {"smi": __version__, "python": platform.python_version(), **{package: _installed(package) for package in PACKAGES}},
        "devices": devices,
        "backend": backend(),
        "kernels": [row._asdict() for row in availability()],
        "verdicts": {device: [verdict._asdict() for verdict in found] for device, found in known_verdicts().items()},
    }


def processor() -> str:
    """The name of the CPU, for example "AMD EPYC 9B14"."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
