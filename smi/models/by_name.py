"""Models by name: timm's architectures with weights from a hub or a local file, the embedded teacher, and models in folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, RunError
from ..surroundings import seeded

CONTAINERS = ("model", "state_dict", "model_state_dict", "model_ema")  # keys under which training scripts put the weights
EMBEDDED = "digits"  # the teacher that comes with the package


@seeded(0)  # a model draws its first weights from the global generator
def load_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    random_weights: bool = False,
    image_size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A model in evaluation mode.

    name: a timm architecture, "digits" for the embedded teacher, or a folder that training or distillation wrote.
    checkpoint: .safetensors, or .pth/.pt/.bin read as data only; its head decides the number of classes. None: pretrained weights from timm's hub.
    random_weights: untrained weights, for timing.
    image_size: height, width in pixels where it differs from the architecture's.

    Raises InputError for an unknown name or a checkpoint that does not fit, RunError where pretrained weights cannot be fetched.
    """
    if checkpoint is not None and random_weights:
        raise InputError("ask for a checkpoint or for random weights, not both")
    if name == EMBEDDED:
        from ..teachers import digits

        if checkpoint or image_size or random_weights:
            raise InputError(f"the model '{EMBEDDED}' comes with its weights and size: leave out checkpoint, random weights and image size")
        return digits().to(device)
    import timm

    if Path(name).is_dir() and not timm.is_model(name):
        from .folder import load_model_folder

        if checkpoint or image_size or random_weights:
            raise InputError(f"the model in {name} comes with its weights and size: leave out checkpoint, random weights and image size")
        return load_model_folder(name).to(device)
    tags = timm.list_pretrained(name.split(".")[0] + ".*") if "." in name else [name]
    if not timm.is_model(name) or name not in tags:
        raise InputError(f"unknown model '{name}'{_suggest(name, timm.list_models())}")
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if checkpoint is not None:
        return _from_file(name, Path(checkpoint), options).to(device).eval()
    if random_weights:
        with torch.device(device):
            return _create(name, options).eval()
    try:
        return timm.create_model(name, pretrained=True, **options).to(device).eval()
    except (AssertionError, TypeError) as error:
        raise InputError(f"{name} cannot be built with {options}: {error}") from error
    except Exception as error:  # hubs fail in many ways: no network, no such file, a proxy
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"pretrained weights of {name} could not be fetched ({reason}): pass a checkpoint file, or ask for random weights") from error


def _create(name: str, options: dict) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, **options)
    except (AssertionError, TypeError, RuntimeError, MemoryError) as error:
        raise InputError(f"{name} cannot be built with {options}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def _suggest(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1)
    return f": did you mean '{close[0]}'?" if close else ": see timm.list_models('*vit*') and timm.list_models('deit*')"


def _from_file(name: str, path: Path, options: dict) -> nn.Module:
    weights = read_weights(path)
    head = weights.get("head.weight")
    if head is not None and head.ndim == 2:
        options = {**options, "num_classes": head.shape[0]}
    model = _create(name, options)
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    shapes = [
        f"{key} is {tuple(weights[key].shape)} but must be {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & weights.keys())
        if weights[key].shape != wanted[key].shape
    ]
    problems = [f"missing {_few(missing)}"] * bool(missing) + [f"not in the model {_few(extra)}"] * bool(extra) + [_few(shapes)] * bool(shapes)
    if problems:
        raise InputError(f"{path} does not fit {name}: {'; '.join(problems)}")
    model.load_state_dict(weights)
    return model


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Named tensors of a checkpoint file, read as data (no code in it is run). Raises InputError where that cannot be done."""
    if not path.is_file():
        raise InputError(f"checkpoint {path} is not a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, not a checkpoint, or holds objects that are not data
        raise InputError(
            f"{path} cannot be read as a checkpoint of plain tensors ({type(error).__name__}): save its state_dict with safetensors"
        ) from error
    for key in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise InputError(f"{path} holds no state_dict: it must map names to tensors, at the top or under one of {', '.join(CONTAINERS)}")
    return {key.removeprefix("module."): value for key, value in content.items()}
