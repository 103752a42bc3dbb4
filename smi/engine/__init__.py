"""Value and pixel gradient of a frozen ViT on (images, index, augmentation)."""

from .reference import Output, forward, forward_patches

__all__ = ["Output", "forward", "forward_patches"]
