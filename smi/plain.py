"""Values at the door: numbers of Python, NumPy and torch become Python's own, once; what is no number of its range is refused.

Each function takes the value's name for the error. `for_json` is for what only describes a result: it never fails.
"""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError

MOST = 10**9  # of anything counted
LARGEST_SIDE = 1 << 12  # pixels of an image
LONGEST_PATH = 4000  # characters
Take = Callable[[str, Any], Any]  # (name, value as given) to the plain value; raises InputError


def scalar(value: Any) -> Any:
    """Python's own number for a NumPy scalar, an array [] or a tensor []; anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 0):
        try:
            return value.item()
        except RuntimeError:  # a tensor without data
            return value
    return value


def whole(least: int = 0, most: int = MOST) -> Take:
    """Whole numbers from `least` to `most`; truth values are none."""

    def take(name: str, value: Any) -> int:
        number = scalar(value)
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
            raise InputError(f"{name} must be a whole number from {least} to {most}, got {shown(value)}")
        return int(number)

    return take


def real(what: str = "a finite number", holds: Callable[[float], bool] = lambda number: True) -> Take:
    """Finite numbers for which `holds`; what: those numbers, for the error."""

    def take(name: str, value: Any) -> float:
        number = scalar(value)
        try:
            fits = isinstance(number, numbers.Real) and not isinstance(number, bool) and math.isfinite(number) and holds(float(number))
        except OverflowError:
            fits = False
        if not fits:
            raise InputError(f"{name} must be {what}, got {shown(value)}")
        return float(number)

    return take


def flag(name: str, value: Any) -> bool:
    """True or False; 1 and 0 stand for them."""
    truth = scalar(value)
    if not isinstance(truth, bool | int) or truth not in (0, 1):
        raise InputError(f"{name} must be True or False, got {shown(value)}")
    return bool(truth)


def word(name: str, value: Any) -> str:
    """A name."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a name, got {type(value).__name__} {shown(value)}")
    return str(value)


def one_of(known: Iterable[str]) -> Take:
    """One of the known names."""

    def take(name: str, value: Any) -> str:
        if word(name, value) not in known:
            *others, last = known
            raise InputError(f"{name} must be {', '.join(others)} or {last}, got '{value}'")
        return str(value)

    return take


def several(each: Take, count: int | None = None) -> Take:
    """Sequences, arrays and tensors of what `each` takes, as a tuple; count: how many, None for any number."""

    def take(name: str, values: Any) -> tuple:
        given = items(values)
        if given is None:
            raise InputError(f"{name} must be a sequence of numbers, got {type(values).__name__} {shown(values)}")
        taken = tuple(each(name, value) for value in given)
        if count is not None and len(taken) != count:
            raise InputError(f"{name} must be {count} numbers, got {len(taken)}")
        return taken

    return take


def items(values: Any) -> list | None:
    """What a sequence, an array or a tensor with data holds; None for what is none of these, texts, mappings and sets among them."""
    if isinstance(values, str | bytes | Mapping | Set):
        return None
    try:
        given = values.tolist() if isinstance(values, np.ndarray | Tensor) else list(values)
    except Exception:  # no iterable, a tensor without data, or one whose own methods fail
        return None
    return given if isinstance(given, list) else None


def holds_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is a plain array of numbers: with data, neither sparse nor nested nor quantised."""
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)


def dense(name: str, value: Any) -> Tensor:
    """A plain array of numbers."""
    if not isinstance(value, Tensor) or not holds_numbers(value):
        odd = f" that is sparse, nested, quantised or without data ({value.layout}, {value.dtype})" if isinstance(value, Tensor) else ""
        raise InputError(f"{name} must be a dense tensor, got {type(value).__name__}{odd}")
    return value


MEANS = several(real("a number from -1e6 to 1e6", lambda value: abs(value) <= 1e6))  # of pixels, per channel
STDS = several(real("a positive number from 1e-6 to 1e6", lambda value: 1e-6 <= value <= 1e6))


def path(name: str, value: Any) -> Path:
    """A path of a file or folder."""
    if not isinstance(value, str | Path) or "\0" in str(value) or len(str(value)) > LONGEST_PATH or any(len(p) > 255 for p in Path(value).parts):
        raise InputError(f"{name} must be a path that a file system takes, got {type(value).__name__} {shown(value)}")
    return Path(value)


def usable_device(device: Any) -> torch.device:
    """A device to run on; raises InputError where it is not to be had."""
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError("neither a CPU nor a CUDA GPU")
        torch.empty(0, device=chosen)
    except Exception as error:  # torch refuses in many ways, and so may a value's own methods
        usable = "'cpu' or 'cuda'" if torch.cuda.is_available() else "'cpu'"
        raise InputError(f"device '{shown(device)}' cannot be used here: try {usable}") from error
    return chosen


def shown(value: Any) -> str:
    """A value for an error, on one line."""
    try:
        return " ".join(str(value).split())[:100]
    except Exception:  # of the value's own __str__
        return type(value).__name__


def for_json(value: Any, depth: int = 32) -> Any:
    """The nearest that JSON can hold: numbers and small arrays as they are, paths and anything else by its text."""
    value = scalar(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | Tensor):
        value = (
            value.tolist()
            if not getattr(value, "is_meta", False) and np.prod(value.shape) <= 1000
            else f"{type(value).__name__} {tuple(value.shape)}"
        )
    if depth and isinstance(value, Mapping):
        return {str(key): for_json(item, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, list | tuple | Set):
        return [for_json(item, depth - 1) for item in value]
    return str(value) if isinstance(value, Path | torch.device | torch.dtype) else shown(value)
