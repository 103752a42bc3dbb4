"""Models by name: timm's architectures with weights from a hub or a local file, the embedded teacher, and models in folders."""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, RunError
from ..plain import flag, path, several, usable_device, whole, word
from ..surroundings import seeded
from .checkpoint import read_weights

HUBS, LOCAL = ("hf-hub:", "hf_hub:"), "local-dir:"  # timm's prefixes of a name: a repository, a folder with config.json and weights
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in such a folder
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

    name: a timm architecture, "digits" for the embedded teacher, or a folder that training or distillation wrote; or "hf-hub:OWNER/NAME" and
    "local-dir:FOLDER" as timm knows them.
    checkpoint: .safetensors, or .pth/.pt/.bin read as data only. Averaged weights (EMA) are preferred where it holds both, as timm does; its tensors
    decide classes, channels and pooling; position embeddings of another image size are resized. None: pretrained weights from timm's hub.
    random_weights: untrained weights, for timing.
    image_size: height, width in pixels where it differs from the architecture's.

    Raises InputError for an unknown name or a checkpoint that does not fit, RunError where pretrained weights cannot be fetched.
    """
    name, device, random_weights = str(path("name", word("name", name))), usable_device(device), flag("random_weights", random_weights)
    checkpoint = None if checkpoint is None else path("checkpoint", checkpoint)
    image_size = None if image_size is None else several(whole(1), 2)("image_size", image_size)
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
    if name.startswith(LOCAL) and checkpoint is None and not random_weights:
        checkpoint = _weights_in(Path(name.removeprefix(LOCAL)))
    elif not name.startswith((*HUBS, LOCAL)):
        tags = timm.list_pretrained(name.split(".")[0] + ".*") if "." in name else [name]
        if not timm.is_model(name) or name not in tags:
            raise InputError(f"unknown model '{name}'{_suggest(name, timm.list_models())}")
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if checkpoint is not None:
        return _from_file(name, Path(checkpoint), options).to(device).eval()
    if random_weights:
        with torch.device(device):
            return create(name, options).eval()
    try:
        return _build(name, pretrained=True, **options).to(device).eval()
    except (AssertionError, TypeError) as error:
        raise InputError(f"{name} cannot be built with {options}: {error}") from error
    except Exception as error:  # hubs fail in many ways: no network, no such file, a proxy
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"pretrained weights of {name} could not be fetched ({reason}): pass a checkpoint file, or ask for random weights") from error


def _weights_in(folder: Path) -> Path:
    """The weights in a folder of the form of the hub."""
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise InputError(f"{folder} holds no weights: there is no {' or '.join(WEIGHTS)} in it")
    return found


def _build(name: str, **options: Any) -> nn.Module:
    """timm's model; one that takes images of any size, as convolutional networks do, is told by its `pretrained_cfg` which it gets."""
    import timm

    try:
        return timm.create_model(name, **options)
    except TypeError as error:
        size = options.pop("img_size", None)
        if size is None or "img_size" not in str(error):
            raise
        model: Any = timm.create_model(name, **options)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (model.pretrained_cfg["input_size"][0], *size)}
        return model


def create(name: str, options: dict) -> nn.Module:
    """timm's model; raises InputError where it cannot be built."""
    try:
        return _build(name, **options)
    except (AssertionError, TypeError, ValueError, KeyError, AttributeError, OSError, RuntimeError, MemoryError) as error:
        raise InputError(f"{name} cannot be built with {options}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def _suggest(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1)
    return f": did you mean '{close[0]}'?" if close else ": see timm.list_models('*vit*') and timm.list_models('deit*')"


def _from_file(name: str, path: Path, options: dict) -> nn.Module:
    """The architecture with the weights of a file, which decide classes, channels and pooling, and are fitted to its image size."""
    weights = read_weights(path)
    model = create(name, {**options, **_read_from(weights)})
    if "fc_norm.weight" in model.state_dict() and "norm.weight" in weights and "fc_norm.weight" not in weights:
        model = create(name, {**options, **_read_from(weights), "global_pool": "token"})
    _fit_positions(weights, model)
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


def _read_from(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of a ViT that its weights tell."""
    head, embed = weights.get("head.weight"), weights.get("patch_embed.proj.weight")
    found: dict[str, Any] = {}
    if head is not None and head.ndim == 2:
        found["num_classes"] = head.shape[0]
    if embed is not None and embed.ndim == 4:
        found["in_chans"] = embed.shape[1]
    if "fc_norm.weight" in weights and "norm.weight" not in weights:
        found["global_pool"] = "avg"  # timm then normalises behind the pooling
    return found


def _fit_positions(weights: dict[str, Tensor], model: Any) -> None:
    """Resize position embeddings of another image size to the model's grid, as timm does."""
    held, wanted = weights.get("pos_embed"), getattr(model, "pos_embed", None)
    if held is None or wanted is None or held.ndim != 3 or held.shape[1] == wanted.shape[1]:
        return
    from timm.layers import resample_abs_pos_embed

    prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
    if held.shape[1] > prefix and isqrt(held.shape[1] - prefix) ** 2 == held.shape[1] - prefix:
        weights["pos_embed"] = resample_abs_pos_embed(held, new_size=list(model.patch_embed.grid_size), num_prefix_tokens=prefix)


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
