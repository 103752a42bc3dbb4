"""Options that several verbs share, the types they take, and the options that follow from the settings of an inversion."""

import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from ..inversion.settings import InvertSettings, setting_named

F = TypeVar("F", bound=Callable[..., Any])


class Numbers(click.ParamType):
    """Whole numbers separated by commas."""

    name = "N,N,..."

    def convert(self, value, param, ctx):
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            return self.fail(f"'{value}' is not a list of whole numbers separated by commas", param, ctx)


class Size(click.ParamType):
    """An image size in pixels."""

    name = "S or HxW"

    def convert(self, value, param, ctx):
        sides = value.lower().split("x")
        if len(sides) not in (1, 2) or not all(side.isascii() and side.isdecimal() and int(side) for side in sides):
            self.fail(f"'{value}' is not a size: give pixels as S or HEIGHTxWIDTH", param, ctx)
        return int(sides[0]), int(sides[-1])


class Fractions(click.ParamType):
    """Numbers separated by commas."""

    name = "X,X,..."

    def convert(self, value, param, ctx):
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            return self.fail(f"'{value}' is not a list of numbers separated by commas", param, ctx)


PATH = click.Path(path_type=Path)
KINDS: dict[Any, Any] = {int: int, float: float, str: str, Sequence[int]: Numbers(), tuple[float, ...]: Fractions()}  # option by a setting's type


def setting(name: str, *short: str, prefix: str = "", **changes: Any) -> Callable[[F], F]:
    """The option of a setting of `smi.invert`: flag, type, default and help follow from the setting. prefix: put before the help."""
    about, flag = setting_named(name), "--" + name.replace("_", "-")
    hint = get_type_hints(InvertSettings)[name]
    allowed = [kind for kind in (get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)) if kind is not type(None)]
    form: dict[str, Any]
    if bool in allowed:  # one that may be None is absent, on or off
        form = {"is_flag": True} if about.default is False else {"default": None}
        flag += "" if about.default is False else f"/--no-{name}"
    else:  # click takes a default of None for a value, and required options for given
        form = {"type": next(KINDS[kind] for kind in allowed if kind in KINDS)} | ({} if about.default is None else {"default": about.default})
    meaning = prefix + about.metadata["meaning"]
    shown = {"show_default": about.metadata["unset"]} if about.metadata["unset"] and "default" not in changes else {}
    return click.option(flag, *short, **{"help": meaning[0].upper() + meaning[1:] + ".", **form, **shown, **changes})


def options(*groups: Callable | Sequence[Callable]) -> Callable[[F], F]:
    """Several options, or lists of them, as one decorator."""
    flat = [option for group in groups for option in (group if isinstance(group, list) else [group])]

    def decorate(function: F) -> F:
        for option in reversed(flat):
            function = option(function)
        return function

    return decorate


MODEL = [
    click.option("--model", default="digits", help="timm architecture, or 'digits' for the embedded teacher."),
    click.option("--image-size", type=Size(), help="Pixels, where it is not the architecture's own."),
]
WEIGHTS = [
    click.option("--checkpoint", type=PATH, help="Weights to load: .safetensors, or .pth read as plain tensors."),
    click.option("--random-weights", is_flag=True, help="Use untrained weights (to measure time)."),
    setting("mean"),
    setting("std"),
]
SCHEDULE = [setting(name) for name in ("iterations", "prune_at", "prune_ratio", "division")]
SEED = setting("seed")
FOLDER = click.argument("folder", type=PATH)
FORCE = setting("force")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
