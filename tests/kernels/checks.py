"""What every kernel test shares: poisoned memory, and the error rule as an assertion that prints the ratio."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smi.kernels.comparison import Error, Example, cast, compare, error_of, poisoned
from smi.kernels.comparison import outcome as run

__all__ = ["VERSIONS", "assert_close_enough", "cast", "check_version", "needs", "poisoned", "run"]
VERSIONS = ["reference", "stock", "triton"] + ([] if torch.cuda.is_available() else ["cpu"])  # of most operations, on the device of the tests


def needs(version: str, dtype: torch.dtype, *taken: torch.dtype) -> None:
    """Skip the test where the C++ for the CPU, which takes the dtypes `taken`, does not take `dtype`."""
    if version == "cpu" and dtype not in taken:
        pytest.skip(f"the C++ for the CPU takes {' and '.join(map(str, taken))}")


def assert_passes(error: Error) -> None:
    ratio = error.error / error.allowed if error.allowed else float(error.error > 0)
    print(f"{error.name}: error {error.error:.2e}, {ratio:.2f} of the {error.allowed:.2e} allowed")
    assert error.passes, f"{error.name}: error {error.error:.3e} exceeds {error.allowed:.3e}, twice same-precision PyTorch's plus rounding"


def assert_close_enough(name: str, out: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The error rule for one tensor. out: the version's result; plain: same-precision PyTorch's; truth: float64."""
    assert_passes(error_of(name, out, plain, truth))


def check_version(
    version: str,
    function: Callable,
    reference: Callable,
    arguments: dict,
    inputs: tuple[str, ...],
    dtype: torch.dtype,
    mutated: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Hold results, gradients in `inputs`, and arguments written in place, of `function` in `version` to the error rule; returns them by name.

    arguments: in float64. function and reference take the same arguments.
    """
    errors, out = compare(version, Example(function, reference, arguments, inputs, mutated), dtype)
    for error in errors:
        assert_passes(error._replace(name=f"{version} {error.name} {dtype}"))
    return out
