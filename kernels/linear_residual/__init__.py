"""A linear layer added to the residual stream."""

from .op import linear_residual

__all__ = ["linear_residual"]
