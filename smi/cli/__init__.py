"""The command `smi`."""

from .main import main, run

__all__ = ["main", "run"]
