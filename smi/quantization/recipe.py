"""How a model is quantised: which tensors, bit widths and how ranges are found."""

from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..plain import flag, one_of, real, whole

LINEAR_INPUTS, PUBLISHED, REPARAMETRIZED = "linear-inputs", "published", "reparametrized"
RECIPES = (LINEAR_INPUTS, PUBLISHED, REPARAMETRIZED)
BITS = range(2, 9)  # a symmetric weight needs two bits; the codes are kept in eight
RANGES = ("minmax", "percentile", "mse")
WEIGHT_RANGES = ("minmax", "mse")
CALIBRATION_IMAGES = 32  # as published
FEW_BITS = {"ranges": "percentile", "weight_ranges": "mse"}  # how the recipe reparametrized finds ranges, unless told otherwise


@dataclass(frozen=True)
class Recipe:
    """Weights per output channel and symmetric, activations per tensor and asymmetric, both uniform.

    name: which activations. "linear-inputs": the inputs of linear layers, as hardware that multiplies integers needs them. "published": every
    activation but the softmax's output, the residual stream included, with the formulas of PSAQ-ViT's protocol. "reparametrized": for few bits, after
    RepQ-ViT: the inputs of linear layers and the operands of attention's GEMMs, LayerNorm channels brought to one range before, the softmax's output
    in steps of half a power of two.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    ranges: str = "minmax"  # of the activations
    percentile: float = 99.9  # ranges="percentile": the upper end of a range; the lower is 100 minus it
    weight_ranges: str = "minmax"
    attention: bool = False  # both operands of attention's two GEMMs too
    name: str = LINEAR_INPUTS

    def __post_init__(self) -> None:
        plain = {
            **{name: whole(BITS[0], BITS[-1])(name, getattr(self, name)) for name in ("weight_bits", "activation_bits")},
            **{name: one_of(known)(called, getattr(self, name)) for name, called, known in _CHOICES},
            "percentile": real("a number between 50 and 100", lambda percent: 50 < percent < 100)("percentile", self.percentile),
            "attention": flag("attention", self.attention),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.attention and self.name != LINEAR_INPUTS:
            raise InputError(f"the recipe {self.name} says itself what of attention is quantised: leave out attention=True")

    @staticmethod
    def of(name: str, ranges: str | None, weight_ranges: str | None, **given: Any) -> "Recipe":
        """A recipe with its own ways to find ranges where None is given."""
        own = FEW_BITS if name == REPARAMETRIZED else dict.fromkeys(FEW_BITS, "minmax")
        given |= {key: value for key, value in (("ranges", ranges), ("weight_ranges", weight_ranges)) if value is not None}
        return Recipe(name=name, **{**own, **given})

    @property
    def published(self) -> bool:
        return self.name == PUBLISHED

    @property
    def reparametrized(self) -> bool:
        return self.name == REPARAMETRIZED

    @property
    def operands(self) -> bool:
        """Whether both operands of attention's two GEMMs are quantised."""
        return self.attention or self.reparametrized

    @property
    def weight_codes(self) -> tuple[int, int]:
        """The least and the largest code of a weight: symmetric but in the published recipe, which has one more below."""
        most = 2 ** (self.weight_bits - 1) - 1
        return -most - self.published, most

    def __str__(self) -> str:
        return f"W{self.weight_bits}/A{self.activation_bits}"


_CHOICES = (("name", "recipe", RECIPES), ("ranges", "ranges", RANGES), ("weight_ranges", "weight_ranges", WEIGHT_RANGES))  # field, setting, values
