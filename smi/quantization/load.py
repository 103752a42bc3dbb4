"""Quantised models read back from their folders."""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..errors import InputError
from .files import FORMAT, MANIFEST, WEIGHTS
from .int8 import Int8ViT
from .model import Facts, QuantizedViT
from .simulate import SimulatedViT


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
        return _load_int8(facts, weights, manifest["inputs"]) if manifest["kind"] == "int8" else _load_simulated(facts, weights)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"reading a simulation needs torchao: pip install torchao ({error})") from error
    except Exception as error:  # a key or a file that is missing, truncated or of another kind
        raise InputError(f"{folder} is damaged: what {MANIFEST} names cannot be read ({type(error).__name__}: {error})") from error


def _load_int8(facts: Facts, weights: Path, inputs: dict) -> Int8ViT:
    return Int8ViT(facts, load_file(weights), {name: (float(scale), int(zero)) for name, (scale, zero) in inputs.items()})


def _load_simulated(facts: Facts, weights: Path) -> SimulatedViT:
    import torchao.quantization.pt2e  # noqa: F401  registers the operations of the graph

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the memory that it reads weights from
        return SimulatedViT(facts, torch.export.load(weights).module(check_guards=False))
