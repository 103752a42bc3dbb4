"""Quantised models read back from their folders."""

from pathlib import Path

from ..errors import InputError
from ..files import read_json, read_tensors
from ..plain import path as path_of
from ..plain import real, whole
from .files import FORMATS, GRAPH_FORMAT, MANIFEST, WEIGHTS
from .int8 import Int8ViT
from .model import Facts
from .network import QuantizedViT
from .simulate import SimulatedViT

KINDS: dict[str, type[QuantizedViT]] = {kind.KIND: kind for kind in (Int8ViT, SimulatedViT)}


def load_quantized(folder: str | Path) -> QuantizedViT:
    """The quantised model, integer or simulated, that `save` wrote to a folder. Raises InputError where there is none, where it is damaged, and for a
    simulation of version 0.1.0, whose file could hold code."""
    folder = path_of("folder", folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} holds no quantised model: there is no {MANIFEST} in it")
    manifest = read_json(path)
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if kind == "simulated" and manifest.get("format") == GRAPH_FORMAT:
        raise InputError(
            f"{folder} holds a simulation of version 0.1.0, a torch.export archive, which could run code when it is read: "
            "make it again with smi.quantize(model, images).save(folder), or smi quantize"
        )
    if not isinstance(kind, str) or kind not in KINDS or manifest.get("format") != FORMATS[kind]:
        raise InputError(f"{path} is not of format {' or '.join(sorted(set(FORMATS.values())))}")
    try:
        facts = Facts.from_json(manifest["facts"])
        inputs = {name: (real()(name, scale), whole(0, 255)(name, zero)) for name, (scale, zero) in manifest["inputs"].items()}
        return KINDS[kind](facts, read_tensors(folder / WEIGHTS[kind])[0], inputs)
    except Exception as error:  # a key or a file that is missing, truncated or of another kind
        raise InputError(f"{folder} is damaged: what {MANIFEST} names cannot be read ({type(error).__name__}: {error})") from error
