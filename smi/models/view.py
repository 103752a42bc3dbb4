"""What of a picture a model sees: how large a part, cut out how, scaled how; the one place that decides it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..plain import one_of, real, scalar

MODES = ("center", "squash", "border")
SCALERS = ("bicubic", "bilinear", "nearest")
MOST_PIXELS = 1 << 26  # of a picture, also when it is scaled; a file of a few bytes can claim any number
PART = real("a positive number of at most 1", lambda value: 0 < value <= 1)


@dataclass(frozen=True)
class View:
    """timm's words for it, from a model's `pretrained_cfg`."""

    crop_pct: float = 1.0  # the model's size over that to which a larger picture is scaled
    crop_mode: str = "center"  # the shorter side is scaled; "squash": both sides, whatever their ratio; "border": the longer side, and mean around it
    interpolation: str = "bicubic"

    @staticmethod
    def of(cfg: Mapping[str, Any] | None) -> "View":
        """That of a model's `pretrained_cfg`; what it does not tell is as above."""
        told = {name: scalar((cfg or {}).get(name)) for name in ("crop_pct", "crop_mode", "interpolation")}
        return View(**{name: value for name, value in told.items() if value})

    def cfg(self) -> dict[str, Any]:
        """As `pretrained_cfg` has it, to be handed on to a model that sees the same."""
        return asdict(self)

    def scale(self, image: Tensor, size: tuple[int, int], mean: tuple[float, ...]) -> Tensor:
        """An image [C, H, W] as fractions of white, of `size`, as timm does; one that is smaller is enlarged whole. Raises InputError for a view that
        it does not know."""
        PART("crop_pct", self.crop_pct)
        one_of(MODES)("crop_mode", self.crop_mode)
        one_of(SCALERS)("interpolation", self.interpolation)
        if tuple(image.shape[1:]) == size:
            return image
        larger = all(side > wanted for wanted, side in zip(size, image.shape[1:], strict=True))
        wanted = [math.floor(side / self.crop_pct) if larger else side for side in size]
        ratios = [scaled / side for scaled, side in zip(wanted, image.shape[1:], strict=True)]
        by = {"center": [max(ratios)] * 2, "squash": ratios, "border": [min(ratios)] * 2}[self.crop_mode]
        nearest = 0.5 if self.crop_mode == "border" else 1e-6  # 1e-6: what is whole but for rounding counts as whole
        rows, columns = (max(1, int(side * ratio + nearest)) for side, ratio in zip(image.shape[1:], by, strict=True))
        if rows * columns > MOST_PIXELS:
            raise InputError(f"a picture of {image.shape[1]}x{image.shape[2]} pixels is too long: scaled for the model it would be {rows}x{columns}")
        smooth = {} if self.interpolation == "nearest" else {"antialias": True, "align_corners": False}
        image = F.interpolate(image[None], size=(rows, columns), mode=self.interpolation, **smooth)[0].clamp(0, 1)
        top, left = round((rows - size[0]) / 2), round((columns - size[1]) / 2)
        if rows < size[0] or columns < size[1]:
            return _on_canvas(image, size, mean)
        return image[:, top : top + size[0], left : left + size[1]]


def _on_canvas(image: Tensor, size: tuple[int, int], mean: tuple[float, ...]) -> Tensor:
    """The middle of an image that is smaller than `size` along at least one side, on pixels of the training mean."""
    canvas = torch.tensor(mean).view(-1, 1, 1).expand(-1, *size).clone()
    ours, theirs = [], []
    for wanted, side in zip(size, image.shape[1:], strict=True):
        common, cut, around = min(wanted, side), max(0, side - wanted) // 2, max(0, wanted - side) // 2
        ours.append(slice(around, around + common))
        theirs.append(slice(cut, cut + common))
    canvas[:, ours[0], ours[1]] = image[:, theirs[0], theirs[1]]
    return canvas


def refuse_torchvision(model: Any) -> None:
    """Raise InputError for torchvision's Vision Transformer, whose class has the name of timm's."""
    if type(model).__module__.startswith("torchvision."):
        raise InputError(
            f"{type(model).__name__} of torchvision is not supported: pass timm's, with the same weights where timm has them (timm.create_model)"
        )
