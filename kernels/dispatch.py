"""The one dispatcher: which version of an operation runs. `versions` lists them.

`auto`, the default of SMI_BACKEND, takes cpu, stock or reference on the CPU; on a GPU it takes the fastest version that was verified there
(`verification`), and stock or reference where none was. Any other value names one version for all operations; `cuda` means CUDA C++ for the
operations written in it, and Triton for the others and for the GEMMs that the CUDA C++ does not take. A version that is named and cannot run raises
BackendUnavailable: nothing falls back silently.
"""

from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import versions
from .versions import NEEDS_VERDICT, BackendUnavailable, ensure_built, exists, first_tensor, why_not

ON_CPU = ("cpu", "stock", "reference")  # in order of preference
ON_GPU_UNVERIFIED = ("stock", "reference")
PLAIN = (Tensor, torch.nn.Parameter)


def resolve(operation: str, function: str, *args) -> str:
    """The version in which raw `function` of `operation` runs on `args`. What it calls is compiled first where it must be; where that fails, auto
    takes the next version. Raises BackendUnavailable where a version that is named cannot run."""
    asked = versions.asked_for()
    if asked == "auto":
        return next(v for v in _by_preference(operation, function, args) if not ensure_built(operation, v))
    version = _cuda_or_triton(operation, function, args) if asked == "cuda" else asked
    if asked == "stock" and not exists(operation, "stock"):
        version = "reference"
    reason = why_not(operation, version, function, args) or ensure_built(operation, version)
    if reason:
        raise BackendUnavailable(f"{operation} was asked to run in {asked} but cannot: {reason}")
    return version


def _cuda_or_triton(operation: str, function: str, args: tuple) -> str:
    """What `cuda` means: Triton where an operation has no CUDA C++, or has some whose module says so (LEFT_TO) for what it does not take."""
    if not exists(operation, "cuda"):
        return "triton"
    left_to = getattr(versions.load(operation, "cuda"), "LEFT_TO", None)
    return left_to if left_to and (why_not(operation, "cuda", function, args) or ensure_built(operation, "cuda")) else "cuda"


def _by_preference(operation: str, function: str, args: tuple) -> Iterator[str]:
    """The versions that take `args`, as auto prefers them."""
    tensor = first_tensor(args)
    if tensor.device.type == "cuda":
        able = [v for v in NEEDS_VERDICT if exists(operation, v) and not why_not(operation, v, function, args)]
        candidates = [v for v in able if not versions.same_as_stock(operation, v, function)]
        if candidates:
            from . import verification  # its files are read only where there is a GPU

            dtype, size = versions.deciding_dtype(operation, function, args), versions.size_class(operation, function, args)
            yield from verification.faster_than_stock(operation, function, candidates, tensor.device, dtype, size)
    for version in ON_CPU if tensor.device.type == "cpu" else ON_GPU_UNVERIFIED:
        if exists(operation, version) and not why_not(operation, version, function, args):
            yield version


def call(operation: str, function: str, *args):
    """Run a raw function in the version that `resolve` names, on the device of its first tensor."""
    tensor = first_tensor(args)
    raw = getattr(versions.load(operation, resolve(operation, function, *args)), function)
    if tensor.device.type != "cuda":
        return raw(*args)
    with torch.cuda.device(tensor.device):  # Triton launches on the current one
        return raw(*args)


def differentiable(operation: str, *args) -> Callable | None:
    """What runs the forward on `args`, and its backward later, in place of the registered operation; None where the registered one must run.

    It is the cpu version's `differentiable(*args)`, where that version is the one to run, a gradient is wanted, and no torch.compile, vmap or
    dispatch mode is active. On small tensors Python's part of a registered operation costs as much as the work, so little is asked here."""
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
    intercepted = _get_current_dispatch_mode() or _len_torch_dispatch_stack_pre_dispatch() or peek_interpreter_stack()
    if not wanted or intercepted or versions.asked_for() not in ("auto", "cpu"):
        return None
    find = _finder(operation)
    return find and find(*args)


@cache
def _finder(operation: str) -> Callable | None:
    try:
        return getattr(versions.load(operation, "cpu"), "differentiable", None)
    except BackendUnavailable:
        return None


class Availability(NamedTuple):
    operation: str
    version: str
    available: bool
    reason: str  # why it is not available; where it runs if it is


def availability() -> list[Availability]:
    """One row for every operation and every version that it has: whether it could run on this machine at all. Compiles nothing."""
    pairs = [(operation, version) for operation in versions.OPERATIONS for version in versions.VERSIONS if exists(operation, version)]
    return [Availability(*pair, *_available(*pair)) for pair in pairs]


def _available(operation: str, version: str) -> tuple[bool, str]:
    try:
        module = versions.load(operation, version)
    except BackendUnavailable as error:
        return False, str(error)
    if version in NEEDS_VERDICT and not torch.cuda.is_available():
        interpreted = version == "triton" and versions.interpreting()
        return (True, "interpreted on the CPU (TRITON_INTERPRET=1)") if interpreted else (False, "no CUDA device")
    reason = getattr(module, "unavailable", lambda: None)()  # for example: there is no compiler
    if reason:
        return False, reason
    where = {"cpu": "CPU", "triton": "GPU", "cuda": "GPU"}.get(version, "any device")
    return True, where if getattr(module, "is_built", lambda: True)() else f"{where}; will be compiled on first use"


def verify(device: torch.device | str = "cuda", operations: Collection[str] = versions.OPERATIONS):
    """The full check of every GPU version on `device`, one verdict after another; see `verification.verify`."""
    from . import verification

    device = torch.device(device)
    if device.index is None:  # verdicts are about one device, and so is a process's choice of it
        device = torch.device(device.type, torch.cuda.current_device())
    return verification.verify(device, operations)


def known_verdicts() -> dict[str, list]:
    """What is known about the GPU versions without a check, `verdicts.Verdict` by device: shipped, kept, and what went wrong the last time."""
    from . import verdicts

    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {str(device): [v for operation in versions.OPERATIONS for v in verdicts.on_device(operation, device)] for device in devices}
