"""Benchmark tests run kernels as the kernel tests do: interpreted faithfully, seeded, unwritten memory poisoned."""

import pytest

from bench.cases import operations
from tests.kernels.conftest import seeded_and_poisoned  # noqa: F401  an autouse fixture

SMALL = operations.Sizes(heads=2, head_width=8, hidden=32, image=64, patch=16)


@pytest.fixture
def small_cases() -> dict[str, operations.Case]:
    """A case of every builder, small, by name."""
    by_tokens = [operations.attention_case, operations.cls_case, operations.norm_case, operations.gelu_case, operations.residual_case]
    cases = [make(5, 2, SMALL) for make in by_tokens]
    cases += [operations.embed_case(4, 2, SMALL), operations.step_case(16, 2, SMALL), operations.tv_case(2, SMALL)]
    return {case.name: case for case in cases}
