"""Values of every type as expressions: a case names them, and its report can be pasted."""

import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

import smi


class Odd:
    """Neither a number nor a container: every question fails."""

    def __index__(self) -> int:
        raise TypeError("no index")

    def __float__(self) -> float:
        raise TypeError("no float")

    def __len__(self) -> int:
        raise TypeError("no length")

    def __iter__(self) -> Any:
        raise TypeError("no items")

    def __eq__(self, other: object) -> bool:
        raise TypeError("no comparison")

    def __bool__(self) -> bool:
        raise TypeError("no truth")

    def __repr__(self) -> str:
        return "Odd()"

    __hash__ = None  # type: ignore[assignment]


class Two:
    """A whole number by __index__ alone."""

    def __index__(self) -> int:
        return 2


NAMES = {"np": np, "torch": torch, "math": math, "Fraction": Fraction, "Decimal": Decimal, "Path": Path, "Odd": Odd, "Two": Two, "smi": smi}
NUMBERS = (
    "0", "1", "-1", "2", "3", "7", "10**6", "10**9", "10**18", "10**400", "-10**400", "10**5000", "0.0", "0.5", "1.0", "2.0", "-0.5",
    "1.5", "1e-300", "1e300",
    "math.nan", "math.inf", "-math.inf", "True", "False",
)  # fmt: skip
SCALARS = (
    "np.int64(2)", "np.uint8(3)", "np.float32(0.5)", "np.float64('nan')", "np.float16('inf')", "np.bool_(True)", "np.array(2)", "np.array(0.5)",
    "torch.tensor(2)", "torch.tensor(0.5)", "torch.tensor(True)", "torch.tensor(math.nan)", "torch.tensor(2, dtype=torch.uint8)", "Two()",
    "torch.tensor(0.5, dtype=torch.bfloat16)", "torch.tensor(0.5, requires_grad=True)", "Fraction(1, 2)", "Decimal('0.5')", "Decimal('NaN')",
    "np.longdouble(0.5)", "np.int64(-1)", "torch.tensor([2])", "np.array([2])",
)  # fmt: skip
TEXTS = (
    "''",
    "'x'",
    "'1'",
    "'0.5'",
    "'smi'",
    "'\\0'",
    "'\\ud800'",
    "'a\\nb'",
    "b'x'",
    "np.str_('smi')",
    "'x' * 10**6",
    "Path('x')",
    "'cuda'",
    "'meta'",
    "'cpu:7'",
)
CONTAINERS = (
    "[]", "()", "{}", "set()", "[1]", "(1, 2)", "[0.5, 0.5, 0.5]", "(0.1, 0.2, 0.3)", "[math.nan] * 3", "[0.0] * 3", "['x']",
    "[None]", "{'a': 1}", "range(3)",
    "iter([1])", "np.array([1, 2])", "np.array([[1]])", "np.array('x')", "np.array(['x'])", "np.array([])", "torch.tensor([1, 2])",
    "torch.tensor([])",
    "torch.zeros(2, 3)", "torch.full((3,), math.nan)", "np.zeros(3)", "[1, [2]]", "[10**30]", "(0.5, 0.9)", "(0.5, 1.0)",
    "(0.5, math.nan)", "(0.5,)",
    "torch.zeros(0, 3, 8, 8)", "torch.zeros(2, device='meta')", "np.array([1, 2], dtype=object)", "[True, False]",
)  # fmt: skip
OBJECTS = (
    "None", "Odd()", "object()", "len", "type", "Ellipsis", "NotImplemented", "lambda *a: 1", "lambda *a: None", "lambda *a: torch.tensor(1.0)",
    "torch.float32", "torch.float64", "torch.device('cpu')", "torch.nn.Linear(2, 2)", "complex(1, 1)", "np.datetime64('2020')", "slice(1)", "[Odd()]",
)  # fmt: skip
EVERY = (*OBJECTS, *NUMBERS, *SCALARS, *TEXTS, *CONTAINERS)


def value(expression: str, **names: Any) -> Any:
    """What an expression of a case stands for."""
    return eval(expression, {**NAMES, **names})  # of this module's lists and the doors'
