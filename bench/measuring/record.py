"""Result files: append-only, one JSON-lines file per device, every row with commit, versions and device."""

import json
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from smi.environment import info_table
from smi.kernels import verification

ROOT = Path(__file__).parents[2]
RESULTS, BASELINE = ROOT / "bench" / "results", ROOT / "bench" / "baseline"


def git(*arguments: str) -> str | None:
    """Output of git in the repository; None where there is no git or no repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> dict:
    """Which code is measured, and whether it is exactly the committed one."""
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results")  # rows are not code
    return {"commit": git("rev-parse", "HEAD") or "unknown", "dirty": changes is None or bool(changes)}


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


def results_file(device_name: str) -> Path:
    """For example bench/results/nvidia-h200.jsonl."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".jsonl")


def append(path: Path | None, rows: Iterable[dict]) -> None:
    """Add rows to a results file; nothing in it is ever rewritten. Without a path nothing is written."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[dict]:
    """All rows of a results file, oldest first; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def newest_run(rows: list[dict]) -> list[dict]:
    """The rows of the last run of the suites."""
    runs = [row["run"] for row in rows if "run" in row]
    return [row for row in rows if row.get("run") == max(runs)] if runs else []
