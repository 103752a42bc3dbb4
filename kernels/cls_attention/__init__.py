"""Attention of the prefix queries alone, and the row that ranks patches."""

from .op import cls_attention

__all__ = ["cls_attention"]
