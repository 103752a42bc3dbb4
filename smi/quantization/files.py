"""Quantised models on disk: one JSON file of facts, one file of weights (safetensors, or torch.export's .pt2); nothing in them is run as code."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from ..files import output_folder, replace_file, write_json
from .model import Facts, QuantizedViT

MANIFEST = "quantized.json"
FORMAT = "smi.Quantized/1"
WEIGHTS = {"int8": "int8.safetensors", "simulated": "simulated.pt2"}


def write(folder: str | Path, kind: str, facts: Facts, save: Callable[[Path], object], details: dict | None = None, *, force: bool = False) -> Path:
    """Write weights, then the facts, each under a temporary name first; raises InputError where the folder is not empty and not `force`."""
    folder = output_folder(folder, force)
    manifest = {"format": FORMAT, "kind": kind, "facts": facts.to_json(), **(details or {})}
    replace_file(folder / WEIGHTS[kind], save)
    write_json(folder / MANIFEST, manifest)
    return folder


def load_quantized(folder: str | Path) -> QuantizedViT:
    """The quantised model, integer or simulated, that `save` wrote to a folder; raises InputError where there is none or it is damaged."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} holds no quantised model: there is no {MANIFEST} in it")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        facts, weights = Facts.from_json(manifest["facts"]), folder / WEIGHTS[manifest["kind"]]
        return _load_int8(facts, weights, manifest) if manifest["kind"] == "int8" else _load_simulated(facts, weights)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"reading a simulation needs torchao: pip install torchao ({error})") from error
    except Exception as error:  # a key or a file that is missing, truncated or of another kind
        raise InputError(f"{folder} is damaged: what {MANIFEST} names cannot be read ({type(error).__name__}: {error})") from error


def _load_int8(facts: Facts, weights: Path, manifest: dict) -> QuantizedViT:
    from safetensors.torch import load_file

    from .int8 import Int8ViT

    inputs = {name: (float(scale), int(zero)) for name, (scale, zero) in manifest["inputs"].items()}
    return Int8ViT(facts, load_file(weights), inputs)


def _load_simulated(facts: Facts, weights: Path) -> QuantizedViT:
    import torch
    import torchao.quantization.pt2e  # noqa: F401  registers the operations of the graph

    from .simulate import SimulatedViT

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the memory that it reads weights from
        return SimulatedViT(facts, torch.export.load(weights).module(check_guards=False))
