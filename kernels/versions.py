"""The versions of the operations: which there are, how one is loaded, asked for and questioned.

Every operation has a reference, and may have faster versions, each a module of its folder with the operation's raw functions (`forward`,
`backward`, ...), all with the same arguments and the same results:

    reference   the definition, registered by op.py, gradients by autograd on it
    stock       stock.py, the best composition of PyTorch's own operations, on any device
    cpu         cpu.py, a composition or C++ made for the CPU
    triton      kernel.py
    cuda        cuda.py, which calls into csrc

SMI_BACKEND, read at every call, or `forced` names the one that is asked for. `dispatch` chooses.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

OPERATIONS = ("patch_embed", "attention", "cls_attention", "layer_norm", "linear_gelu", "linear_residual", "image_step")
VERSIONS = ("reference", "stock", "cpu", "triton", "cuda")
BACKENDS = ("auto", "reference", "stock", "triton", "cuda")
MODULES = {"stock": "stock", "cpu": "cpu", "triton": "kernel", "cuda": "cuda"}
NEEDS_VERDICT = ("cuda", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_references: dict[str, dict[str, Callable]] = {}  # operation -> raw function name -> reference version, filled by registration
_forced: ContextVar[str | None] = ContextVar("forced", default=None)


class BackendUnavailable(RuntimeError):
    """A version that was asked for cannot run; the message says which, for what, and why."""


def backend() -> str:
    """The value of SMI_BACKEND; raises BackendUnavailable where it names none of BACKENDS."""
    name = os.environ.get("SMI_BACKEND", "auto").strip().lower() or "auto"
    if name not in BACKENDS:
        raise BackendUnavailable(f"SMI_BACKEND={name} is not a backend: use one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def forced(version: str) -> Iterator[None]:
    """Within it, in this thread, every operation runs in `version`, whatever SMI_BACKEND says."""
    token = _forced.set(version)
    try:
        yield
    finally:
        _forced.reset(token)


def asked_for() -> str:
    """The version that `forced` names or, without it, the value of SMI_BACKEND."""
    return _forced.get() or backend()


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def exists(operation: str, version: str) -> bool:
    """Whether the operation has this version."""
    return version == "reference" or find_spec(f"smi.kernels.{operation}.{MODULES[version]}") is not None


@cache
def load(operation: str, version: str) -> ModuleType | SimpleNamespace:
    """The raw functions of one version. Raises BackendUnavailable if it does not exist or cannot be imported."""
    if not exists(operation, version):
        raise BackendUnavailable(f"{operation} has no {version} version")
    try:
        import_module(f"smi.kernels.{operation}.op")  # registers the reference
        if version == "reference":
            return SimpleNamespace(**_references[operation])
        return import_module(f"smi.kernels.{operation}.{MODULES[version]}")
    except ImportError as error:
        raise BackendUnavailable(f"{operation} in {version} cannot be loaded: {error}") from error


def same_as_stock(operation: str, version: str, function: str) -> bool:
    """Whether a version takes this raw function from stock, where nothing can be gained by another."""
    stock = load(operation, "stock") if exists(operation, "stock") else None
    return getattr(load(operation, version), function) is getattr(stock, function, None)


def set_reference(operation: str, function: str, reference: Callable) -> None:
    """Name the reference version of a raw function; called by registration."""
    _references.setdefault(operation, {})[function] = reference


def first_tensor(args: tuple) -> Tensor:
    """The first of `args` that is a tensor: nearly always the very first."""
    return args[0] if isinstance(args[0], Tensor) else next(arg for arg in args if isinstance(arg, Tensor))


def why_not(operation: str, version: str, function: str, args: tuple) -> str | None:
    """Why this version does not take `args` for raw `function`; None if it does. Its own limits are its `unsupported(function, *args)`. Builds
    nothing: what must be compiled first is `ensure_built`'s."""
    tensor = first_tensor(args)
    if version != "reference":
        reason = _why_not_on(version, tensor.device.type, tensor.dtype)
        if reason:
            return reason
    try:
        module = load(operation, version)
    except BackendUnavailable as error:
        return str(error)
    limits = getattr(module, "unsupported", None)
    return limits(function, *args) if limits else None


def ensure_built(operation: str, version: str) -> str | None:
    """Compile what this version calls, where that is missing; why it cannot be had, None if it can. A build that failed is not tried again."""
    build = getattr(load(operation, version), "ensure_built", None)
    return build() if build else None


def _why_not_on(version: str, device: str, dtype: torch.dtype) -> str | None:
    if version == "cpu" and device != "cpu":
        return f"it runs on the CPU, the tensors are on {device}"
    if version == "triton" and device == "cpu" and not interpreting():
        return "Triton needs tensors on a CUDA device, or TRITON_INTERPRET=1 to be interpreted, slowly, on the CPU"
    if version == "cuda" and device != "cuda":
        return f"it needs tensors on a CUDA device, these are on {device}"
    if version in NEEDS_VERDICT and dtype not in TRITON_DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def deciding_dtype(operation: str, function: str, args: tuple) -> torch.dtype:
    """The dtype whose measurement decides for `args`: what op.py's `deciding_dtype` says, or that of the first tensor."""
    decide = getattr(import_module(f"smi.kernels.{operation}.op"), "deciding_dtype", None)
    return decide(function, *args) if decide else first_tensor(args).dtype


def sizes_of(operation: str) -> ModuleType:
    """The operation's sizes.py: its classes of sizes, and the arguments that stand for them."""
    return import_module(f"smi.kernels.{operation}.sizes")


def size_class(operation: str, function: str, args: tuple) -> str:
    """The class of sizes whose measurement decides for `args` of raw `function`."""
    return sizes_of(operation).size_class(function, *args)
