"""Checkpoint files that people have, read as data: weights alone, whatever a training script put around them.

No code in a file runs: torch.load reads plain containers and tensors (weights_only), and a few classes that only hold values.
"""

import argparse
import datetime
import pathlib
import re
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import read_tensors

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")  # exponential moving averages: preferred, as timm does
CONTAINERS = (*AVERAGED, "state_dict", "model", "model_state_dict", "module", "teacher")  # keys under which training scripts put the weights
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put in front of every name
COUNTERS = ("n_averaged",)  # of torch's AveragedModel, beside the weights
ANCHOR = "patch_embed.proj.weight"  # a weight of every ViT: what stands in front of it stands in front of the others
DEPTH = 4  # containers within containers


def read_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors of a checkpoint file by timm's names. Raises InputError where that cannot be done."""
    if not path.is_file():
        raise InputError(f"checkpoint {path} is not a file")
    content = _content(path)
    for _ in range(DEPTH):
        if not isinstance(content, Mapping):
            break
        content = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping) and content[key]), content)
    if isinstance(content, Mapping):
        content = {key: value for key, value in content.items() if key not in COUNTERS}
    if not isinstance(content, Mapping) or not content or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise InputError(f"{path} holds no state_dict: it must map names to tensors, at the top or under one of {', '.join(CONTAINERS)}")
    if any(value.numel() * value.itemsize > path.stat().st_size for value in content.values()):
        raise InputError(f"{path} holds a tensor that takes more memory than the file holds: save its state_dict with safetensors")
    return _without_prefixes(path, content)


def _content(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)[0]
        if zipfile.is_zipfile(path) and sum(each.file_size for each in zipfile.ZipFile(path).infolist()) > path.stat().st_size:
            raise InputError(f"{path} is a compressed archive that takes more memory than the file holds: save it with torch.save or safetensors")
        with torch.serialization.safe_globals(_values()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # truncated, not a checkpoint, or holds objects that are not data
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds a {found[1]}, which is no data" if found else type(error).__name__
        raise InputError(f"{path} cannot be read as a checkpoint of plain tensors ({reason}): save its state_dict with safetensors") from error


def _values() -> list[Any]:
    """Classes whose objects are values: made from plain numbers and texts, they do nothing."""
    multiarray = (getattr(np, "_core", None) or np.core).multiarray
    numpy = [(getattr(multiarray, name), f"numpy.{core}.multiarray.{name}") for name in ("scalar", "_reconstruct") for core in ("core", "_core")]
    dtypes = {type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU"}
    paths = [(pathlib.PurePosixPath, "pathlib.PosixPath"), (pathlib.PureWindowsPath, "pathlib.WindowsPath")]
    dates = [datetime.datetime, datetime.date, datetime.timedelta]
    return [argparse.Namespace, types.SimpleNamespace, *paths, *dates, *numpy, np.ndarray, np.dtype, *dtypes]


def _without_prefixes(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names that timm gives them: without wrappers, and without the name of the module that the ViT was part of."""
    named = {_unwrapped(name): tensor for name, tensor in weights.items()}
    fronts = sorted(name.removesuffix(ANCHOR) for name in named if name.endswith(ANCHOR) and name.removesuffix(ANCHOR)[-1:] in ("", "."))
    if len(fronts) > 1:
        raise InputError(f"{path} holds several models, {', '.join(fronts)}: save the state_dict of one of them")
    stripped = {name.removeprefix(fronts[0]): tensor for name, tensor in named.items()} if fronts else named
    if len(stripped) < len(weights):
        raise InputError(f"{path} gives two weights the same name once their prefixes are gone: save the state_dict of one model")
    return stripped


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name
