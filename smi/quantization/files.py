"""The format of quantised models on disk: one JSON file of facts, one file of weights (safetensors, or torch.export's .pt2).

Nothing in them is run as code.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import output_folder, replace_file, write_json
from .model import Facts

MANIFEST = "quantized.json"
FORMAT = "smi.Quantized/1"
WEIGHTS = {"int8": "int8.safetensors", "simulated": "simulated.pt2"}


def write(
    folder: str | Path, kind: str, facts: Facts, save: Callable[[Path], object], details: dict[str, Any] | None = None, *, force: bool = False
) -> Path:
    """Write weights, then the facts, each under a temporary name first; raises InputError where the folder is not empty and not `force`."""
    folder = output_folder(folder, force)
    manifest = {"format": FORMAT, "kind": kind, "facts": facts.to_json(), **(details or {})}
    replace_file(folder / WEIGHTS[kind], save)
    write_json(folder / MANIFEST, manifest)
    return folder
