"""Value and pixel gradient of a frozen ViT on (images, index, augmentation): the reference, and the fused engine that runs by default."""

from .fused import Fused, pass_bytes
from .reference import Output, forward, forward_patches
from .step import Step

__all__ = ["Fused", "Output", "Step", "forward", "forward_patches", "pass_bytes"]
