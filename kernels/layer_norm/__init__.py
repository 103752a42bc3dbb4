"""Layer normalisation with the residual addition fused."""

from .op import layer_norm

__all__ = ["layer_norm"]
