"""What every kernel test shares: the error rule, poisoned memory, and one comparison of a version with the reference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from smi.kernels import dispatch
from smi.kernels.precision import same_precision
from torch import Tensor

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # largest relative error of any version


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it torch.empty and its kin return NaN (largest value for integers)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch then fills uninitialised memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def relative_error(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth|| in float64; ||out|| where truth is zero, NaN where out has one."""
    out, truth = out.detach().double(), truth.detach().double()
    norm = torch.linalg.vector_norm(truth)
    return ((torch.linalg.vector_norm(out - truth) / norm) if norm > 0 else torch.linalg.vector_norm(out)).item()


def assert_close_enough(name: str, out: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The error rule: at most twice the error of plain PyTorch in the same precision, plus the rounding of truth to that precision; prints the ratio.

    out: the version's result; plain: same-precision PyTorch's; truth: float64. Also holds the error to BOUNDS.
    """
    assert out.shape == truth.shape, f"{name}: shape {tuple(out.shape)}, not {tuple(truth.shape)}"
    assert out.dtype == plain.dtype, f"{name}: dtype {out.dtype}, not {plain.dtype}"
    error, allowed = relative_error(out, truth), 2 * relative_error(plain, truth) + relative_error(truth.to(out.dtype), truth)
    print(f"{name}: error {error:.2e}, {error / allowed if allowed else float(error > 0):.2f} of the {allowed:.2e} allowed")
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}, twice same-precision PyTorch's plus rounding"
    assert error < BOUNDS[out.dtype], f"{name}: error {error:.3e} is not below {BOUNDS[out.dtype]}"


def run(function: Callable, arguments: dict, differentiable: tuple[str, ...], weights: tuple[Tensor, ...] = ()) -> dict[str, Tensor]:
    """Results and gradients of `function(**arguments)` by name: out0, out1, ..., d_x, ...

    differentiable: arguments to differentiate in. The loss is the sum of every result times its weight.
    """
    leaves = {name: arguments[name].detach().requires_grad_() for name in differentiable}
    results = function(**arguments | leaves)
    results = (results,) if isinstance(results, Tensor) else tuple(results)
    found = {f"out{i}": result.detach() for i, result in enumerate(results)}
    loss = sum((result * weight.to(result.dtype)).sum() for result, weight in zip(results, weights, strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return found | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def cast(arguments: dict, dtype: torch.dtype) -> dict:
    """Floating-point tensors among `arguments` in `dtype`, strides kept; everything else as it is."""
    return {name: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in arguments.items()}


def check_version(
    version: str, function: Callable, reference: Callable, arguments: dict, differentiable: tuple[str, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Hold results and gradients of `function` in `version` to the error rule against `reference` in float64; returns them.

    arguments: in float64 (rounded to `dtype` first, so that all sides see the same numbers). function and reference take the same arguments.
    """
    rounded = cast(arguments, dtype)
    exact = cast(rounded, torch.float64)
    with torch.no_grad():
        results = reference(**exact)
    weights = tuple(torch.randn_like(result).to(dtype).double() for result in ((results,) if isinstance(results, Tensor) else results))
    truth = run(reference, exact, differentiable, weights)
    with same_precision():
        plain = run(reference, rounded, differentiable, weights)
    with dispatch.forced(version), torch.autograd.set_multithreading_enabled(False):  # `forced` holds for this thread only
        out = run(function, rounded, differentiable, weights)
    for name in truth:
        assert_close_enough(f"{version} {name} {dtype}", out[name], plain[name], truth[name])
    return out
