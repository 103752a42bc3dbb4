"""At which level a model runs: natively, by the engine that takes its patches apart, or as a module, by autograd through whole images."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..errors import InputError
from ..plain import several, whole
from ..surroundings import at_the_door, neutral, seeded
from . import module, vit
from .description import ViT
from .module import Classifier

Model = ViT | Classifier
METHODS = {"native": ("dense", "smi", "pri", "psaq", "gaussian"), "module": ("dense", "gaussian"), "refused": ()}  # by level


@dataclass(frozen=True)
class Level:
    """How far a model is supported, and why no further."""

    model: str  # its architecture
    level: str  # "native": the engine computes it; "module": it runs as it is; "refused"
    reason: str
    methods: tuple[str, ...]  # of smi.invert that work on it

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "methods": list(self.methods)}


@at_the_door
def describe(model: nn.Module, *, image_size: tuple[int, int] | None = None) -> Level:
    """At which level `smi.invert` takes a model, and why.

    native: the engine computes the model from its weights, proven against the model's own logits and pixel gradients. module: the engine does not
    know the model, which runs by its own modules and autograd; it sees whole images, so sparse methods do not work on it. refused: it is no
    classifier of images either. The last two come with the reason.

    image_size: height, width in pixels, for a module that does not tell it. Raises InputError for what is no torch.nn.Module.
    """
    try:
        found, why = _read(model, None, image_size, None, None)
    except InputError as error:
        if not isinstance(model, nn.Module):
            raise
        name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
        return Level(name, "refused", str(error), METHODS["refused"])
    native = isinstance(found, ViT)
    level = "native" if native else "module"
    return Level(found.name, level, "the engine computes it from its weights" if native else why, METHODS[level])


def read_model(
    model: nn.Module,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    flip: bool | None = None,
    image_size: tuple[int, int] | None = None,
) -> tuple[Model, str]:
    """What is known of a model, and why it is not native ("" where it is). mean, std, flip: as of `vit.describe`. Raises InputError."""
    found, why = _read(model, flip, image_size, mean, std)
    if isinstance(found, ViT):
        if image_size is not None and tuple(image_size) != found.image_size:
            raise InputError(f"{found.name} takes images of {found.image_size}: leave out image_size={tuple(image_size)}")
        return vit.with_statistics(found, mean, std), why
    return module.with_statistics(found), why


def _read(
    model: nn.Module,
    flip: bool | None,
    image_size: tuple[int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> tuple[Model, str]:
    image_size = None if image_size is None else several(whole(1), 2)("image_size", image_size)
    try:
        return vit.describe_weights(model, flip=flip), ""
    except InputError as error:
        if not isinstance(model, nn.Module):
            raise
        why = str(error)
    try:
        return module.classifier(model, mean=mean, std=std, flip=flip, image_size=image_size), why
    except InputError as error:
        raise InputError(f"{why}; nor does it run as a module: {error}") from error


def timm_levels(words: str | None = None) -> Iterator[Level]:
    """The level of each of timm's architectures, built without numbers; of those with `words` in their name, or matched by it as a pattern."""
    import timm
    import torch

    from .by_name import create

    pattern = "" if words is None else words if "*" in words else f"*{words}*"
    for name in timm.list_models(pattern):
        try:
            with neutral(), seeded(0), torch.device("meta"):
                built = create(name, {}).eval()
            found = describe(built)
        except (InputError, RuntimeError, NotImplementedError) as error:
            yield Level(name, "refused", f"it cannot be built without numbers ({' '.join(str(error).split())[:200]})", METHODS["refused"])
        else:
            yield Level(name, found.level, found.reason, found.methods)
