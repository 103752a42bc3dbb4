"""How a model is quantised: bit widths and how ranges are found."""

from dataclasses import dataclass

from ..errors import InputError

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
        for name, bits in (("weight_bits", self.weight_bits), ("activation_bits", self.activation_bits)):
            if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
                raise InputError(f"{name} must be a whole number from {BITS[0]} to {BITS[-1]}, got {bits}")
        for name, value, known in (("ranges", self.ranges, RANGES), ("weight_ranges", self.weight_ranges, WEIGHT_RANGES)):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got '{value}'")
        if not 50 < self.percentile < 100:
            raise InputError(f"percentile must lie between 50 and 100, got {self.percentile}")

    def __str__(self) -> str:
        return f"W{self.weight_bits}/A{self.activation_bits}"
