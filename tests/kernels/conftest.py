"""Kernel tests: interpreted faithfully where there is no GPU (../../conftest.py sets the switch), seeded, unwritten memory poisoned."""

import os

import pytest
import torch

from tests.kernels import checks, interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.repair()


@pytest.fixture(autouse=True)
def seeded_and_poisoned(monkeypatch):
    """Every test: the same random numbers, NaN in memory that was allocated and not written, no backend from outside."""
    monkeypatch.delenv("SMI_BACKEND", raising=False)
    torch.manual_seed(0)
    with checks.poisoned():
        yield


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels run here: cuda, or the CPU, interpreted."""
    return "cuda" if torch.cuda.is_available() else "cpu"
