"""The folder of a distillation: the state that a killed run goes on from, the learning curve, and at the end the student and the result."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import InputError, RunError
from ..files import output_folder, write_json, write_text
from ..models.folder import DESCRIPTION, WEIGHTS, save_model, save_weights
from .pool import remove_pools

STATE, CURVE, RESULT = "state.safetensors", "curve.jsonl", "result.json"


def open_folder(path: Path, force: bool) -> Path:
    """The folder, made if need be; one that holds a distillation is kept as it is unless force. Raises InputError where it holds anything else."""
    if path.is_dir() and not force and ((path / STATE).exists() or (path / RESULT).exists()):
        return path
    killed_early = path.is_dir() and all(_left_by_a_kill(entry.name) for entry in path.iterdir())
    output_folder(path, force or killed_early)
    for name in (STATE, RESULT, CURVE, DESCRIPTION, WEIGHTS):
        (path / name).unlink(missing_ok=True)
    remove_pools(path)
    return path


def _left_by_a_kill(name: str) -> bool:
    """Whether a run that was killed before its first state leaves such a file: pools of images, and temporary files of ours and of safetensors."""
    return name.startswith(("pool-", ".tmp")) or (name.startswith(".") and name.endswith(".tmp"))


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
    return json.loads(path.read_text()) if path.exists() else None


def _failed(path: Path, error: OSError) -> RunError:
    return RunError(f"writing {path} failed ({error.strerror or error})")
