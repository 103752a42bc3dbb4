"""How a model is quantised: bit widths and how ranges are found."""

from dataclasses import dataclass

from ..plain import flag, one_of, real, whole

BITS = range(2, 9)  # a symmetric weight needs two bits; the codes are kept in eight
RANGES = ("minmax", "percentile", "mse")
WEIGHT_RANGES = ("minmax", "mse")
CALIBRATION_IMAGES = 32  # as published


@dataclass(frozen=True)
class Recipe:
    """Weights per output channel and symmetric, activations per tensor and asymmetric, both uniform."""

    weight_bits: int = 8
    activation_bits: int = 8
    ranges: str = "minmax"  # of the activations
    percentile: float = 99.9  # ranges="percentile": the upper end of a range; the lower is 100 minus it
    weight_ranges: str = "minmax"
    attention: bool = False  # both operands of attention's two GEMMs too

    def __post_init__(self) -> None:
        plain = {
            **{name: whole(BITS[0], BITS[-1])(name, getattr(self, name)) for name in ("weight_bits", "activation_bits")},
            **{name: one_of(known)(name, getattr(self, name)) for name, known in (("ranges", RANGES), ("weight_ranges", WEIGHT_RANGES))},
            "percentile": real("a number between 50 and 100", lambda percent: 50 < percent < 100)("percentile", self.percentile),
            "attention": flag("attention", self.attention),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return f"W{self.weight_bits}/A{self.activation_bits}"
