"""Kernels compiled ahead of time for every architecture are what the committed file says: no spills, and no change unseen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from smi.kernels import dispatch

WITH_TRITON = [operation for operation in dispatch.OPERATIONS if dispatch.exists(operation, "triton")]


IN_TESTS = ["layer_norm"]  # all of them take tens of minutes: python -m bench.compile_gate --check


@pytest.mark.slow
@pytest.mark.parametrize("operation", IN_TESTS)
def test_gate(operation):
    """In a process of its own, in which Triton compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile_gate", "--check", "--only", operation]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_every_operation_has_kernels():
    assert set(WITH_TRITON) == set(dispatch.OPERATIONS)
