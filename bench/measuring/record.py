"""Result files: append-only, one JSON-lines file per device, every row with commit, versions and device."""

import platform
import re
import time
from pathlib import Path

import torch

from smi.environment import info_table
from smi.kernels import verification

from .code import ROOT, commit
from .rows_file import append, read

__all__ = ["BASELINE", "RESULTS", "ROOT", "append", "commit", "read"]

RESULTS, BASELINE = ROOT / "bench" / "results", ROOT / "bench" / "baseline"


def cuda_environment(device: torch.device) -> dict:
    """What every row says about the GPU it was measured on."""
    properties = torch.cuda.get_device_properties(device)
    return commit() | {
        "device": properties.name,
        "architecture": verification.architecture(device),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": verification.installed("triton"),
        "python": platform.python_version(),
    }


def environment(device: torch.device) -> dict:
    """What every row says about where and when it was measured."""
    if device.type == "cuda":
        return cuda_environment(device) | {"device_class": device_class(device), "time": now()}
    info = info_table()
    about = {"device": info["devices"][0]["name"], "device_class": device_class(device), "threads": torch.get_num_threads()}
    return commit() | about | info["versions"] | {"system": f"{platform.system()} {platform.machine()}", "time": now()}


def run_environment(device: torch.device) -> dict:
    """The same for a run of the suites: all of its rows have the same `run`."""
    about = environment(device)
    return about | {"run": about["time"]}


def origin() -> dict:
    """Where a baseline comes from."""
    about = environment(torch.device("cpu"))
    return {name: about[name] for name in ("commit", "dirty", "device", "system", "python", "torch", "triton", "timm", "time")}


def now() -> str:
    """Coordinated universal time, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def device_class(device: torch.device) -> str:
    """What a baseline of ratios is valid for: for example cuda-sm_90, cpu-avx2-2threads, cpu-avx512-bf16-amx-1threads."""
    if device.type == "cuda":
        return f"cuda-{verification.architecture(device)}"
    widths = torch.backends.cpu.get_cpu_capability().lower()
    native = "-bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    tiles = "-amx" if torch.cpu._is_amx_tile_supported() else ""  # GEMMs twice as fast, all else alike: other ratios
    return f"cpu-{widths}{native}{tiles}-{torch.get_num_threads()}threads"


def results_file(device_name: str, folder: Path | None = None) -> Path:
    """For example bench/results/nvidia-h200.jsonl, or the same name in another folder."""
    return (folder or RESULTS) / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".jsonl")


def newest_run(rows: list[dict]) -> list[dict]:
    """The rows of the last run of the suites."""
    runs = [row["run"] for row in rows if "run" in row]
    return [row for row in rows if row.get("run") == max(runs)] if runs else []
