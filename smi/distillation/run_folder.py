"""The folder of a distillation: the state that a killed run goes on from, the learning curve, and at the end the student and the result."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InputError, RunError
from ..files import left_by_a_kill, output_folder, read_json, write_json, write_text
from ..models.folder import DESCRIPTION, WEIGHTS, save_model, save_weights
from .pool import POOL, remove_pools
from .training_state import is_state

STATE, CURVE, RESULT = "state.safetensors", "curve.jsonl", "result.json"


def open_folder(path: Path, force: bool) -> Path:
    """The folder, made if need be; one that holds a distillation is kept as it is, and emptied of it where `force`. Raises InputError where it holds
    anything else."""
    entries = list(path.iterdir()) if path.is_dir() else []
    ours = is_state(path / STATE) or _is_result(path / RESULT)
    if ours and not force:
        return path
    if not ours and not all(POOL.fullmatch(entry.name) or left_by_a_kill(entry.name) for entry in entries):  # a kill before the first state
        why = "which is all that --force (force=True) starts over" if force else "which could go on"
        raise InputError(f"output folder {path} is not empty and holds no distillation, {why}: choose another")
    output_folder(path, force=True)
    for name in (STATE, RESULT, CURVE, DESCRIPTION, WEIGHTS) if ours else ():
        (path / name).unlink(missing_ok=True)
    remove_pools(path)
    return path


def _is_result(path: Path) -> bool:
    """Whether `write_result` wrote this file."""
    try:
        return path.is_file() and {"asked", "result"} <= read_json(path).keys()
    except (InputError, AttributeError):
        return False


def write_curve(folder: Path, curve: list[dict]) -> None:
    """Replace the learning curve; raises RunError where that fails."""
    try:
        write_text(folder / CURVE, "".join(json.dumps(row) + "\n" for row in curve))
    except OSError as error:
        raise _failed(folder / CURVE, error) from error


def write_result(folder: Path, student: nn.Module, asked: dict, result: dict) -> None:
    """End the run. The student comes first, then what says that the run has ended, then the state goes: a kill in between loses nothing."""
    try:
        save_model(student, folder, result)
    except InputError:  # no architecture that can be built again by name: its weights alone
        save_weights(student, folder)
    try:
        write_json(folder / RESULT, {"asked": asked, "result": result})
    except OSError as error:
        raise _failed(folder / RESULT, error) from error
    (folder / STATE).unlink(missing_ok=True)
    remove_pools(folder)


def read_result(folder: Path) -> dict[str, Any] | None:
    """What `write_result` wrote, under "asked" and "result"; None where the run has not ended."""
    path = folder / RESULT
    return read_json(path) if path.exists() else None


def _failed(path: Path, error: OSError) -> RunError:
    return RunError(f"writing {path} failed ({error.strerror or error})")
