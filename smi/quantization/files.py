"""The format of quantised models on disk: one JSON file of facts, one safetensors file of codes, scales and float tensors. Both are data."""

from collections.abc import Callable, Mapping
from pathlib import Path

from ..files import output_folder, replace_file, write_json
from .model import Facts

MANIFEST = "quantized.json"
WEIGHTS = {"int8": "int8.safetensors", "simulated": "simulated.safetensors"}
FORMATS = {"int8": "smi.Quantized/1", "simulated": "smi.Quantized/2"}
GRAPH_FORMAT = "smi.Quantized/1"  # of simulations up to version 0.1.0: a torch.export archive, which can hold code


def write(
    folder: str | Path, kind: str, facts: Facts, save: Callable[[Path], object], inputs: Mapping[str, tuple[float, int]], *, force: bool = False
) -> Path:
    """Write weights, then the facts, each under a temporary name first; raises InputError where the folder is not empty and not `force`."""
    folder = output_folder(folder, force)
    replace_file(folder / WEIGHTS[kind], save)
    write_json(folder / MANIFEST, {"format": FORMATS[kind], "kind": kind, "facts": facts.to_json(), "inputs": inputs})
    return folder
