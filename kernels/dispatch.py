"""The one dispatcher: which version of an operation runs.

Every operation has a reference, and may have faster versions, each a module of its folder with the operation's raw functions (`forward`,
`backward`, ...), all with the same arguments and the same results:

    reference   the definition, registered by op.py, gradients by autograd on it
    stock       stock.py, the best composition of PyTorch's own operations, on any device
    cpu         cpu.py, a composition or C++ made for the CPU
    triton      kernel.py
    cuda        cuda.py, which calls into csrc

SMI_BACKEND, read at every call, names one for all operations. `auto`, the default, takes cpu, stock or reference on the CPU; on a GPU it takes the
fastest version that was verified there (`verification`), and stock or reference where none was. `cuda` means CUDA C++ for the operations written
in it and Triton for the others. A forced version that cannot run raises BackendUnavailable: nothing falls back silently.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.utils._python_dispatch import _get_current_dispatch_mode

OPERATIONS = ("patch_embed", "attention", "cls_attention", "layer_norm", "linear_gelu", "linear_residual", "image_step")
VERSIONS = ("reference", "stock", "cpu", "triton", "cuda")
BACKENDS = ("auto", "reference", "stock", "triton", "cuda")
MODULES = {"stock": "stock", "cpu": "cpu", "triton": "kernel", "cuda": "cuda"}
ON_CPU = ("cpu", "stock", "reference")  # in order of preference
ON_GPU_UNVERIFIED = ("stock", "reference")
NEEDS_VERDICT = ("cuda", "triton")
PLAIN = (Tensor, torch.nn.Parameter)
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


def set_reference(operation: str, function: str, reference: Callable) -> None:
    """Name the reference version of a raw function; called by registration."""
    _references.setdefault(operation, {})[function] = reference


def first_tensor(args: tuple) -> Tensor:
    """The first of `args` that is a tensor: nearly always the very first."""
    return args[0] if isinstance(args[0], Tensor) else next(arg for arg in args if isinstance(arg, Tensor))


def why_not(operation: str, version: str, function: str, args: tuple) -> str | None:
    """Why this version cannot run raw `function` on `args`; None if it can. A version's own limits are its `unsupported(function, *args)`."""
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


def resolve(operation: str, function: str, *args) -> str:
    """The version in which raw `function` of `operation` runs on `args`. Raises BackendUnavailable where a forced one cannot."""
    asked = _forced.get() or backend()
    if asked != "auto":
        version = "triton" if asked == "cuda" and not exists(operation, "cuda") else asked
        if asked == "stock" and not exists(operation, "stock"):
            version = "reference"
        reason = why_not(operation, version, function, args)
        if reason:
            raise BackendUnavailable(f"{operation} was asked to run in {asked} but cannot: {reason}")
        return version
    tensor = first_tensor(args)
    if tensor.device.type == "cuda":
        candidates = [v for v in NEEDS_VERDICT if exists(operation, v) and not why_not(operation, v, function, args)]
        if candidates:
            from . import verification  # its files are read only where there is a GPU

            dtype, size = deciding_dtype(operation, function, args), size_class(operation, function, args)
            best = verification.fastest(operation, candidates, tensor.device, dtype, size)
            if best:
                return best
    order = ON_CPU if tensor.device.type == "cpu" else ON_GPU_UNVERIFIED
    return next(v for v in order if exists(operation, v) and not why_not(operation, v, function, args))


def deciding_dtype(operation: str, function: str, args: tuple) -> torch.dtype:
    """The dtype whose measurement decides for `args`: what op.py's `deciding_dtype` says, or that of the first tensor."""
    decide = getattr(import_module(f"smi.kernels.{operation}.op"), "deciding_dtype", None)
    return decide(function, *args) if decide else first_tensor(args).dtype


def size_class(operation: str, function: str, args: tuple) -> str:
    """The class of sizes whose measurement decides for `args`: what op.py's `size_class` says, or "any"."""
    classify = getattr(import_module(f"smi.kernels.{operation}.op"), "size_class", None)
    return classify(function, *args) if classify else "any"


def call(operation: str, function: str, *args):
    """Run a raw function in the version that `resolve` names, on the device of its first tensor."""
    tensor = first_tensor(args)
    raw = getattr(load(operation, resolve(operation, function, *args)), function)
    if tensor.device.type != "cuda":
        return raw(*args)
    with torch.cuda.device(tensor.device):  # Triton launches on the current one
        return raw(*args)


def differentiable(operation: str, *args) -> Callable | None:
    """What runs the forward on `args`, and its backward later, in place of the registered operation: where `resolve` says cpu, that version has such
    a function (its `differentiable(*args)`), and nobody watches or transforms operations. On small tensors Python's part of a registered operation
    costs as much as the work, so no more is asked here than must be."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    wanted = False
    for arg in args:
        if type(arg) in PLAIN:
            if not arg.is_cpu or arg.is_neg() or arg._is_zerotensor():
                return None
            wanted = wanted or arg.requires_grad
        elif isinstance(arg, Tensor):
            return None
    watched = _get_current_dispatch_mode() or _len_torch_dispatch_stack_pre_dispatch() or peek_interpreter_stack()
    if not wanted or watched or (_forced.get() or backend()) not in ("auto", "cpu"):
        return None
    find = _finder(operation)
    return find and find(*args)


@cache
def _finder(operation: str) -> Callable | None:
    try:
        return getattr(load(operation, "cpu"), "differentiable", None)
    except BackendUnavailable:
        return None


class Availability(NamedTuple):
    operation: str
    version: str
    available: bool
    reason: str  # why it is not available; where it runs if it is


def availability() -> list[Availability]:
    """One row for every operation and every version that it has: whether it could run on this machine at all."""
    pairs = [(operation, version) for operation in OPERATIONS for version in VERSIONS if exists(operation, version)]
    return [Availability(*pair, *_available(*pair)) for pair in pairs]


def _available(operation: str, version: str) -> tuple[bool, str]:
    try:
        module = load(operation, version)
    except BackendUnavailable as error:
        return False, str(error)
    if version in NEEDS_VERDICT and not torch.cuda.is_available():
        interpreted = version == "triton" and interpreting()
        return (True, "interpreted on the CPU (TRITON_INTERPRET=1)") if interpreted else (False, "no CUDA device")
    reason = getattr(module, "unavailable", lambda: None)()  # for example: the compiled library is missing
    where = {"cpu": "CPU", "triton": "GPU", "cuda": "GPU"}.get(version, "any device")
    return (False, reason) if reason else (True, where)


def verify(device: torch.device | str = "cuda"):
    """The full self-check of every GPU version on `device`; see `verification.verify`."""
    from . import verification

    return verification.verify(torch.device(device))
