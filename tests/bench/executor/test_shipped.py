"""A block or a few of every shipped Triton tile for sm_90, compiled and executed: right by the error rule, no race, no missing fence."""

import os
import re
import subprocess
import sys

import pytest

from bench.measuring.record import ROOT
from smi.kernels import versions

PARTS = {"attention": 4}  # about fifteen seconds each, so that two processes share them evenly
OPERATIONS = [operation for operation in versions.OPERATIONS if versions.exists(operation, "triton")]
SHARES = [(name, f"{i}/{PARTS.get(name, 1)}") for name in OPERATIONS for i in range(1, PARTS.get(name, 1) + 1)]


def run(*arguments: str) -> subprocess.CompletedProcess:
    """A module in a process of its own, in which Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("operation", "part"), SHARES, ids=lambda value: value.replace("/", "of"))
def test_every_tile_for_sm_90(operation, part):
    """What fails here if it comes back: cp.async data read by wgmma without a proxy fence, a register of A overwritten under a wgmma in flight."""
    done = run("bench.executor", "--shipped", "--arch", "90", "--only", operation, "--part", part)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "right sm_90" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_register_is_reused_under_a_wgmma():
    """In the machine code, of the kernels whose wgmma take A from registers in a loop."""
    done = run("bench.executor.machine_code", "linear_gelu", "patch_embed")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 have hazards" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_planted_faults_are_noticed():
    """One instruction of a right GEMM broken at a time, up to three of a kind; not all of them matter."""
    faults = ("no barrier", "no proxy fence", "no wgmma wait", "no cp.async wait", "ldmatrix transposed", "wrong mask", "shared store moved")
    done = run("bench.executor.planted", "--case", "linear_residual/fwd/bf16_64x64x64_for_sm90", "--only", *faults)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    for fault in faults:
        assert re.search(f"{fault}: noticed in [1-3] of [1-3] places", done.stdout)
