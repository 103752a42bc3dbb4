"""The state of a training run in one file, so that a killed run goes on where it was: weights, optimiser and progress, as safetensors and JSON.

The file is written under a temporary name and moved: after a kill there is the earlier state or the later one, never half of one.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError, RunError
from ..files import read_tensors, replace_file

FORMAT = "smi.training-state/1"


def save_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Mapping, extra: Mapping[str, Tensor] | None = None) -> None:
    """Write weights, the optimiser's state, `progress` (JSON) and further named tensors. Raises RunError where that fails."""
    state = optimiser.state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"extra.{name}": tensor for name, tensor in (extra or {}).items()}
    plain: dict[str, dict] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser.{number}.{name}"] = value
            else:
                plain.setdefault(str(number), {})[name] = value
    meta = {"format": FORMAT, "groups": json.dumps(state["param_groups"]), "plain": json.dumps(plain), "progress": json.dumps(progress)}
    try:
        # clones: tensors that share memory are refused, and a run must not change what is being written
        held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        replace_file(path, lambda temporary: save_file(held, temporary, metadata=meta), durable=True)
    except (OSError, SafetensorError) as error:
        raise RunError(f"writing {path} failed ({getattr(error, 'strerror', None) or error})") from error


def is_state(path: Path) -> bool:
    """Whether `save_state` wrote this file."""
    try:
        return read_tensors(path)[1].get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def load_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[dict, dict[str, Tensor]]:
    """Put a state back; returns its progress and further tensors. Raises InputError where the file is of another model or damaged."""
    try:
        tensors, meta = read_tensors(path)
        if meta.get("format") != FORMAT:
            raise InputError(f"{path} is not of format {FORMAT}")
        groups, plain, progress = (json.loads(meta[name]) for name in ("groups", "plain", "progress"))
        state: dict[int, dict] = {int(number): values for number, values in plain.items()}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, number, field = name.split(".", 2)
                state.setdefault(int(number), {})[field] = tensor
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")})
        optimiser.load_state_dict({"state": state, "param_groups": groups})
    except InputError:
        raise
    except Exception as error:  # a tensor, a key or a value that is missing or of another kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be resumed from ({reason}): use another output folder, or remove that file") from error
    return progress, {name.removeprefix("extra."): tensor for name, tensor in tensors.items() if name.startswith("extra.")}
