"""How a version is held against the reference: the error rule, on an operation's results and gradients, or on what one raw function of it returns.

A version passes if its error ||out - truth|| / ||truth|| against float64 is at most twice the error that plain PyTorch makes in the same precision,
plus the rounding of truth to that precision, and stays below BOUNDS.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import versions
from .precision import same_precision

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # largest relative error of any version


@dataclass(frozen=True)
class Example:
    """An operation on arguments: what is checked and timed. function, reference: public function and definition, same arguments; inputs: names of the
    arguments to differentiate in; mutated: names of those written in place."""

    function: Callable
    reference: Callable
    arguments: dict
    inputs: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()


class Error(NamedTuple):
    """Error of one result or gradient, and what the rule allows."""

    name: str
    error: float
    allowed: float

    @property
    def passes(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def relative_error(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth|| in float64; ||out|| where truth is zero, NaN where out has one."""
    out, truth = out.detach().double(), truth.detach().double()
    norm = torch.linalg.vector_norm(truth)
    return (torch.linalg.vector_norm(out - truth) / norm if norm > 0 else torch.linalg.vector_norm(out)).item()


def error_of(name: str, out: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype | None = None) -> Error:
    """out: the version's; plain: same-precision PyTorch's; truth: float64; dtype: of the precision, that of out by default."""
    allowed = 2 * relative_error(plain, truth) + relative_error(truth.to(out.dtype), truth)
    return Error(name, relative_error(out, truth), min(allowed, BOUNDS[dtype or out.dtype]))


def cast(arguments: dict, dtype: torch.dtype) -> dict:
    """Floating-point tensors among `arguments` in `dtype`, strides kept; everything else as it is."""
    return {name: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in arguments.items()}


def as_tuple(results) -> tuple[Tensor, ...]:
    return () if results is None else (results,) if isinstance(results, Tensor) else tuple(results)


def outcome(function: Callable, arguments: dict, inputs: tuple[str, ...], weights: tuple[Tensor, ...] = (), mutated: tuple[str, ...] = ()) -> dict:
    """Results, gradients and arguments written in place, by name: out0, out1, ..., d_x, ..., new_x.

    The loss is the sum of every result times its weight. Nothing of `arguments` is changed.
    """
    leaves = {name: arguments[name].detach().requires_grad_() for name in inputs}
    copies = {name: arguments[name].clone() for name in mutated}
    results = as_tuple(function(**arguments | leaves | copies))
    found = {f"out{i}": result.detach() for i, result in enumerate(results)} | {f"new_{name}": copy for name, copy in copies.items()}
    if inputs:
        grads = torch.autograd.grad(results, list(leaves.values()), [w.to(r.dtype) for w, r in zip(weights, results, strict=True)])
        found |= {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def compare(version: str, example: Example, dtype: torch.dtype) -> tuple[list[Error], dict[str, Tensor]]:
    """Errors of `version` in `dtype`, and what it computed. The example's numbers are rounded to `dtype` first: all sides see the same."""
    function, reference, inputs, mutated = example.function, example.reference, example.inputs, example.mutated
    rounded = cast(example.arguments, dtype)
    exact = cast(rounded, torch.float64)
    with torch.no_grad():
        shapes = as_tuple(reference(**exact | {name: exact[name].clone() for name in mutated}))
    weights = tuple(torch.randn_like(result).to(dtype).double() for result in shapes)
    truth = outcome(reference, exact, inputs, weights, mutated)
    with same_precision():
        plain = outcome(reference, rounded, inputs, weights, mutated)
    with versions.forced(version), torch.autograd.set_multithreading_enabled(False):  # `forced` holds for this thread only
        out = outcome(function, rounded, inputs, weights, mutated)
    for name, value in truth.items():
        if out[name].shape != value.shape or out[name].dtype != plain[name].dtype:
            found, wanted = (f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (out[name], plain[name]))
            raise AssertionError(f"{version} {name}: {found}, not {wanted}")
    return [error_of(name, out[name], plain[name], truth[name]) for name in truth], out


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it torch.empty and its kin return NaN (largest value for integers)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch then fills uninitialised memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


Comparable = Callable[[str, tuple, tuple[Tensor, ...]], tuple[Tensor, ...]]


def compare_function(
    operation: str, function: str, version: str, args: tuple, dtype: torch.dtype, written: tuple[int, ...] = (), comparable: Comparable | None = None
) -> list[Error]:
    """Errors of raw `function` in `version` on `args`, whose precision is `dtype`: of its results, or of the arguments at the places `written`, and
    of these alone. comparable: leaves out of the results what nobody reads. Memory that the version does not write is poisoned."""

    def result(version: str, args: tuple) -> tuple[Tensor, ...]:
        args = tuple(arg.clone() if i in written else arg for i, arg in enumerate(args))
        returned = as_tuple(getattr(versions.load(operation, version), function)(*args))
        found = tuple(args[i] for i in written) or returned
        return comparable(function, args, found) if comparable else found

    truth = result("reference", _in_dtype(args, torch.float64))
    with same_precision():
        plain = result("reference", _in_dtype(args, dtype))
    with poisoned():
        out = result(version, args)
    for i, (mine, wanted) in enumerate(zip(out, truth, strict=True)):
        if mine.shape != wanted.shape:
            raise AssertionError(f"{version} out{i}: {tuple(mine.shape)}, not {tuple(wanted.shape)}")
    return [error_of(f"out{i}", *sides, dtype) for i, sides in enumerate(zip(out, plain, truth, strict=True))]


def _in_dtype(args: tuple, dtype: torch.dtype) -> tuple:
    """Floating-point tensors, and dtypes, among args in `dtype`."""
    return tuple(
        dtype if isinstance(arg, torch.dtype) else arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args
    )
