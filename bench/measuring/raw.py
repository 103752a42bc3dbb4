"""One version of a raw function on given arguments, held against the definition in float64 by the error rule."""

import torch
from torch import Tensor

from smi.kernels import comparison, versions
from smi.kernels.precision import same_precision


def results(operation: str, function: str, version: str, args: tuple, written: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
    """What a raw function returns, or the copies of its arguments that it writes; written: their places."""
    args = tuple(arg.clone() if i in written and arg is not None else arg for i, arg in enumerate(args))
    returned = comparison.as_tuple(getattr(versions.load(operation, version), function)(*args))
    return tuple(args[i] for i in written if args[i] is not None) or returned


def in_float64(args: tuple) -> tuple:
    """Arguments with floating-point tensors, and dtypes, as float64."""

    def wide(arg):
        if isinstance(arg, torch.dtype):
            return torch.float64
        return arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg

    return tuple(map(wide, args))


def truth_and_plain(operation: str, function: str, args: tuple, written: tuple[int, ...] = ()) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the definition makes of the arguments in float64, and what plain PyTorch makes of them in their own precision."""
    truth = results(operation, function, "reference", in_float64(args), written)
    with same_precision():
        return truth, results(operation, function, "reference", args, written)
