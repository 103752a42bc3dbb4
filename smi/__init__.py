"""Data-free inversion of Vision Transformers: dense, sparse (SMI) and patch rebirth (PRI)."""

from .distillation import distill
from .errors import InputError, RunError
from .evaluate import evaluate
from .forward import forward_sparse
from .inversion import invert, invert_batches
from .losses import default_losses
from .quantization import load_quantized, quantize
from .schedules import Event, Schedule
from .settings import Iteration
from .sparse_images import SparseImages
from .version import __version__
from .wrappers import accelerate, drop_in

__all__ = [
    "Event",
    "InputError",
    "Iteration",
    "RunError",
    "Schedule",
    "SparseImages",
    "__version__",
    "accelerate",
    "default_losses",
    "distill",
    "drop_in",
    "evaluate",
    "forward_sparse",
    "invert",
    "invert_batches",
    "load_quantized",
    "quantize",
]
