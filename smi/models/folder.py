"""A model in a folder: model.safetensors with the weights; model.json with the architecture, the statistics of its training images and a record.

It holds teachers and students that are no timm architecture by name; `smi invert --model FOLDER` takes them like any other.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError, RunError
from ..files import read_json, read_tensors, replace_file, write_json
from ..plain import LARGEST_SIDE, MEANS, STDS, real, several, whole
from ..surroundings import seeded
from .vit import ViT, describe_weights

FORMAT = "smi.model/1"
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
STATISTICS = ("architecture", "mean", "std", "flip", "crop_pct", "crop_mode", "interpolation")  # what is saved of timm's pretrained_cfg
NAMED_OPTIONS = {"num_classes", "in_chans", "img_size"}  # of a timm model by its name
OPTIONS = NAMED_OPTIONS | {"patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "init_values", "pos_embed"}
OPTIONS |= {"no_embed_class", "reg_tokens", "pre_norm", "global_pool", "act_layer"}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}  # kernels.linear_gelu's names in timm's registry


def save_model(model: nn.Module, folder: str | Path, record: Mapping | None = None) -> Path:
    """Write a supported ViT, or any model that timm makes by name, with a JSON record of how it was made. Raises InputError where it is neither,
    RunError where writing fails."""
    folder = Path(folder)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    about = {"format": FORMAT, "architecture": architecture(model), "statistics": {k: cfg[k] for k in STATISTICS if k in cfg}, "record": record or {}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(model, folder)
        write_json(folder / DESCRIPTION, about)
    except OSError as error:
        raise RunError(f"writing {folder} failed ({error.strerror or error})") from error
    return folder


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights alone, of a model that the caller can build again. Raises RunError where writing fails."""
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    try:
        replace_file(folder / WEIGHTS, lambda path: save_file(weights, path))
    except (OSError, SafetensorError) as error:
        raise RunError(f"writing {folder} failed ({getattr(error, 'strerror', None) or error})") from error


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights that `save_model` or `save_weights` wrote. Raises InputError where they cannot be read."""
    try:
        return read_tensors(folder / WEIGHTS)[0]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} holds no readable {WEIGHTS} ({error})") from error


@seeded(0)  # a model draws its first weights from the global generator
def load_model_folder(folder: str | Path) -> nn.Module:
    """The model that `save_model` wrote, in evaluation mode. Raises InputError where there is none or it is damaged."""
    folder = Path(folder)
    about = _description(folder)
    try:
        weights, made = read_tensors(folder / WEIGHTS)[0], about["architecture"]
        _refuse_foreign(made, weights)
        model: Any = build(made)
        model.load_state_dict(weights)
        model.pretrained_cfg = _checked_statistics(about["statistics"])
    except Exception as error:  # a key, a value or a file that is missing, truncated or of another kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the model in {folder} is damaged or was written by another version ({reason})") from error
    return model.eval()


def record_of(folder: str | Path) -> dict:
    """How the model in a folder was made and what it scores."""
    return _description(Path(folder)).get("record", {})


def _description(folder: Path) -> dict:
    """What DESCRIPTION holds; raises InputError where it is none of ours."""
    try:
        about = read_json(folder / DESCRIPTION)
    except InputError as error:
        raise InputError(f"{folder} holds no model: there is no readable {DESCRIPTION} in it") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{folder / DESCRIPTION} is not of format {FORMAT}")
    return about


def _refuse_foreign(made: Mapping, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError for an architecture that `architecture` does not give, or that is larger than the weights: before anything is built of it."""
    options, largest = made["options"], max([len(weights), *(side for tensor in weights.values() for side in tensor.shape)], default=0)
    if "timm" in made:
        import timm

        if not timm.is_model(made["timm"]):
            raise ValueError(f"timm has no model {made['timm']!r:.100}")
    foreign = options.keys() - (NAMED_OPTIONS if "timm" in made else OPTIONS)
    if foreign:
        raise ValueError(f"the option {min(foreign)!r:.100} is none of ours")
    height, width = several(whole(1, LARGEST_SIDE), 2)("img_size", options.get("img_size", [1, 1]))
    for name, value in options.items():
        if isinstance(value, int | float) and not 0 <= value <= largest:
            raise ValueError(f"{name} {value!r:.100} is more than the weights hold")
        if not (value is None or isinstance(value, bool | int | float | str)) and name != "img_size":
            raise ValueError(f"{name} is of another type")
    if options.get("pos_embed") == "learn" and (height // options["patch_size"]) * (width // options["patch_size"]) > largest:
        raise ValueError(f"an image of {height}x{width} has more patches than the weights hold")


def _checked_statistics(statistics: Mapping) -> dict[str, Any]:
    """What is saved of timm's pretrained_cfg, from a file; raises InputError for values that no images have."""
    checked = {name: value for name, value in statistics.items() if name in STATISTICS and (value is None or isinstance(value, bool | str))}
    takes = {
        "mean": MEANS,
        "std": STDS,
        "crop_pct": real("positive", lambda value: value > 0),
    }
    for name, take in takes.items():
        if statistics.get(name) is not None:
            checked[name] = take(name, statistics[name])
    return checked


def build(made: Mapping) -> nn.Module:
    """A model of the architecture that `architecture` gave, with newly initialised weights."""
    if "timm" in made:
        import timm

        return timm.create_model(made["timm"], **made["options"])
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    options = {name: value for name, value in made["options"].items() if (name, value) != ("pos_embed", "learn")}  # the default; new in timm 1.0.9
    return (VisionTransformerDistilled if made["distilled"] else VisionTransformer)(**options)


def architecture(model: nn.Module) -> dict:
    """What `build` needs to make a model like this one: timm's name, or the arguments of VisionTransformer. Raises InputError where neither
    gives it back."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    candidates = [made for made in (_named(model, name), _arguments(model)) if made is not None]
    for made in candidates:
        if _same(model, made):
            return made
    raise InputError(f"{name or type(model).__name__} cannot be written to a folder: it is neither a timm model by its name nor a supported ViT")


def _named(model: Any, name: str | None) -> dict | None:
    import timm

    if not name or not timm.is_model(name):
        return None
    options = {"num_classes": model.num_classes}
    if hasattr(model, "in_chans"):
        options["in_chans"] = model.in_chans
    if hasattr(getattr(model, "patch_embed", None), "img_size"):
        options["img_size"] = list(model.patch_embed.img_size)
    return {"timm": name, "options": options}


def _arguments(model: Any) -> dict | None:
    try:
        vit = describe_weights(model)
    except (InputError, AttributeError):
        return None
    block, distilled = vit.blocks[0], hasattr(model, "dist_token")
    options = {
        "img_size": list(vit.image_size),
        "patch_size": vit.patch_size,
        "in_chans": vit.channels,
        "num_classes": vit.num_classes,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.num_heads,
        "mlp_ratio": block.hidden / vit.embed_dim,
        "qkv_bias": block.qkv.bias is not None,
        "qk_norm": block.q_norm is not None,
        "init_values": None if block.scale1 is None else 1e-5,
        "pos_embed": "none" if vit.position is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": 0 if distilled else vit.num_prefix - 1,
        "pre_norm": vit.norm_pre is not None,
        "global_pool": vit.pool,
        "act_layer": ACTIVATIONS[block.activation],
    }
    return {"distilled": distilled, "options": options}


def _same(model: nn.Module, made: Mapping) -> bool:
    """Whether `build` gives the same computation and tensors of the same shapes."""
    try:
        other = build(made)
        shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (model, other)]
        return type(model) is type(other) and shapes[0] == shapes[1] and _facts(model) == _facts(other)
    except (TypeError, ValueError, RuntimeError, AssertionError):
        return False


def _facts(model: nn.Module) -> Any:
    """What a supported ViT computes, with shapes in the place of weights; of other models what they print."""
    try:
        return _shapes(replace(describe_weights(model, flip=True), mean=(), std=()))
    except InputError:
        return str(model)


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple):
        return tuple(map(_shapes, value))
    if is_dataclass(value):
        apart = ("name", "view") if isinstance(value, ViT) else ()  # of the images, not of the computation
        return {field.name: _shapes(getattr(value, field.name)) for field in fields(value) if field.name not in apart}
    return value
