"""Patch embedding of the active patches of a rolled and flipped image."""

from .op import patch_embed

__all__ = ["patch_embed"]
