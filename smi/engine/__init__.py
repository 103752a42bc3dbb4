"""Value and pixel gradient of a frozen ViT on (images, index, augmentation): the reference, and the fused engine that runs by default."""

from .fused import Fused
from .reference import Output, forward, forward_patches
from .saved_activations import Mode, pass_bytes

__all__ = ["Fused", "Mode", "Output", "forward", "forward_patches", "pass_bytes"]
