"""Multi-head attention over retained tokens."""

from .op import attention

__all__ = ["attention"]
