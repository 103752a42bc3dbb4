"""The machine: versions, what was carried to it and whether that can be used, its ceilings; compute-sanitizer on csrc."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from smi.csrc import build
from smi.kernels import verification, versions

from ..measuring.ceilings import ceilings_by_dtype
from . import pack
from .setting import Setting, settle
from .worker import Work

TOOLS = ("memcheck", "racecheck")  # of compute-sanitizer
SMALL_LENGTHS = (1, 29, 47, 100)  # tokens of the sanitised calls
HEADS, WIDTH = 2, 64


def run(work: Work) -> None:
    """Versions; the carried library and Triton's cache put in place; ceilings."""
    setting = settle(work)

    def measured_ceilings() -> list[dict]:
        found = ceilings_by_dtype(setting.device)
        return [{"kind": "ceilings", "ceilings": {name: list(values) for name, values in found.items()}}]

    cases = {"versions": lambda: [about_machine(setting)], "carried": lambda: [place_carried()], "ceilings": measured_ceilings}
    work.cases(cases, setting.file, setting.about)
    for row in work.rows:
        if row["kind"] == "ceilings":
            work.found += [f"{name} {flops / 1e12:.0f} TFLOP/s" for name, (_, flops) in row["ceilings"].items()]
            work.found.append(f"copy {max(moved for moved, _ in row['ceilings'].values()) / 1e9:.0f} GB/s")
        elif row["kind"] == "carried":
            work.found.append(
                f"libraries: {', '.join(f'{name} {state}' for name, state in row['libraries'].items())}; Triton's cache: {row['triton_cache']}"
            )


def about_machine(setting: Setting) -> dict:
    found = {"kind": "machine", "python": sys.version.split()[0], "torch": torch.__version__, "triton": verification.installed("triton")}
    found |= {name: verification.installed(name) for name in ("timm", "numpy", "nvidia-cublas")}
    found |= {"nvcc": output([build.nvcc() or "nvcc", "--version"])[-120:], "processors": os.cpu_count()}
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        named = ("name", "total_memory", "multi_processor_count", "shared_memory_per_block_optin", "L2_cache_size")
        found |= {name: getattr(properties, name, None) for name in named}
        found["smi"] = output(["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu", "--format=csv"])
    return found


def output(command: list[str]) -> str:
    """What a command prints; why it cannot be had."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def place_carried() -> dict:
    """Put the library and Triton's cache, which were made elsewhere, where they are looked for; only what this machine can use."""
    return {"kind": "carried", "libraries": {name: pack.place_library(name) for name in pack.LIBRARIES}, "triton_cache": pack.place_cache()}


# ---- compute-sanitizer


def sanitizer(work: Work) -> None:
    """memcheck and racecheck side by side on csrc's attention, in small."""
    setting = settle(work)
    started = {} if shutil.which("compute-sanitizer") is None else {tool: start(tool) for tool in TOOLS}
    work.cases({tool: lambda tool=tool: [verdict_of(tool, started.get(tool), work)] for tool in TOOLS}, setting.file, setting.about)
    work.found += [f"{row['tool']}: {row['said']}" for row in work.rows]


def start(tool: str) -> subprocess.Popen:
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kernel_substring=attention", "--print-limit", "20", "--error-exitcode", "9"]
    return subprocess.Popen([*command, sys.executable, "-m", __name__], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def verdict_of(tool: str, process: subprocess.Popen | None, work: Work) -> dict:
    about = {"kind": "sanitizer", "tool": tool}
    if process is None:
        return about | {"said": "compute-sanitizer is not there"}
    try:
        text, _ = process.communicate(timeout=max(1.0, work.left() - 2))
    except subprocess.TimeoutExpired:
        process.kill()
        return about | {"said": "not finished in time"}
    summary = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", text)
    return about | {"said": summary[-1] if summary else f"no summary, exit code {process.returncode}", "output": text[-4000:]}


def sanitised() -> None:
    """What runs under compute-sanitizer: csrc's attention, forward and backward; inputs come from the CPU, so that no other kernel is looked at."""
    kernel = versions.load("attention", "cuda")
    for n in SMALL_LENGTHS:
        qkv, grad = torch.randn(2, n, 3, HEADS, WIDTH).bfloat16().cuda(), torch.randn(2, n, HEADS * WIDTH).bfloat16().cuda()
        out, lse = kernel.forward(qkv, None, None, WIDTH**-0.5)
        kernel.backward(grad, qkv, None, None, out, lse, WIDTH**-0.5)
    torch.cuda.synchronize()


if __name__ == "__main__":
    began = time.monotonic()
    sanitised()
    print(f"{Path(sys.argv[0]).name}: {time.monotonic() - began:.1f} s")
