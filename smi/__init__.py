"""Data-free inversion of Vision Transformers: dense, sparse (SMI) and patch rebirth (PRI).

    images = smi.invert(model, method="pri", division=7, num_images=128)    a timm ViT to SparseImages
    logits = smi.forward_sparse(model, images)                              of the retained patches alone
    quantised = smi.quantize(model, images)                                 calibrated without data
    result = smi.distill(model, student, images)                            a student learns from them

`invert_batches`, `Schedule`, `Event`, `Iteration`, `default_losses`, `smi.losses` and `smi.importance` are for inversions of one's own; `drop_in` and
`accelerate` put the engine behind existing calls; `evaluate` judges images. A request that cannot be met raises `InputError`, a run that fails
`RunError`.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

for folder in ("kernels", "csrc"):  # in a checkout they lie beside smi/, not in it
    init = Path(__file__).parents[1] / folder / "__init__.py"
    spec = None if (Path(__file__).parent / folder).exists() else spec_from_file_location(f"{__name__}.{folder}", init)
    if spec is not None and spec.loader is not None:
        sys.modules[spec.name] = globals()[folder] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
del folder, init, spec

from .distillation import distill
from .engine.drop_in import accelerate, drop_in
from .errors import InputError, RunError
from .evaluate import evaluate
from .images.forward import forward_sparse
from .images.sparse_images import SparseImages
from .inversion import importance, losses
from .inversion.loop import invert, invert_batches
from .inversion.losses import default_losses
from .inversion.progress import Iteration
from .inversion.schedules import Event, Schedule
from .models.levels import describe
from .quantization import load_quantized, quantize, save_onnx
from .version import __version__

for public in (importance, losses):
    sys.modules[f"{__name__}.{public.__name__.rsplit('.', 1)[1]}"] = public  # `from smi.importance import Snapshot` works too
del public

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
    "describe",
    "distill",
    "drop_in",
    "evaluate",
    "forward_sparse",
    "invert",
    "invert_batches",
    "load_quantized",
    "quantize",
    "save_onnx",
]
