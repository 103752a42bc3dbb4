"""Total variation, Adam and clipping of the optimised pixels."""

from .op import image_step, tv_norms

__all__ = ["image_step", "tv_norms"]
