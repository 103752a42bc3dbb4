"""A linear layer followed by its activation."""

from .op import linear_gelu

__all__ = ["linear_gelu"]
