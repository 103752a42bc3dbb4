"""Trained models: described, found by name, kept in folders."""

from .vit import ViT, describe

__all__ = ["ViT", "describe"]
