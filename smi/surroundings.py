"""What surrounds a call: global state of PyTorch that decides results, and state of the user's that a call borrows.

A public call computes the same whatever surrounds it, and leaves the surroundings as they were. `neutral` stands at every door; `seeded` lends the
global generators; `evaluating` lends a model's mode.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def neutral(grad: bool | None = True) -> Iterator[None]:
    """Within it: no inference mode, no autocast, float32 and the CPU as defaults, no deterministic mode, float32 GEMMs in full precision.

    grad: whether gradients are recorded; None: as outside, where inference mode counts as no. Only what differs is set, and it is set back.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            grad = bool(grad)
            stack.enter_context(torch.inference_mode(False))
        if grad is not None and torch.is_grad_enabled() != grad:
            stack.enter_context(torch.set_grad_enabled(grad))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for read, set_to, wanted in _FLAGS:
            _set(stack, read, set_to, wanted)
        yield


def _set_deterministic(state: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(state[0], warn_only=state[1])


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


_FLAGS: tuple[tuple[Callable[[], Any], Callable[[Any], None], Any], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    (_deterministic, _set_deterministic, (False, False)),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
)


def _set(stack: ExitStack, read: Callable[[], Any], set_to: Callable[[Any], None], wanted: Any) -> None:
    before = read()
    if before != wanted:
        stack.callback(set_to, before)
        set_to(wanted)


_of_this_call: ContextVar["WeakKeyDictionary[nn.Module, dict] | None"] = ContextVar("of_this_call", default=None)


@contextmanager
def door() -> Iterator[None]:
    """What a public call does, it does within this: in `neutral` surroundings, with a memory of its own."""
    token = None if _of_this_call.get() is not None else _of_this_call.set(WeakKeyDictionary())
    try:
        with neutral():
            yield
    finally:
        if token is not None:
            _of_this_call.reset(token)


def memory_of_this_call() -> "WeakKeyDictionary[nn.Module, dict] | None":
    """What was found out about models since the public call began; None outside of one."""
    return _of_this_call.get()


def at_the_door(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run behind the `door`."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with door():
            return function(*args, **kwargs)

    return call


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within it the global generators of the CPU and of `device`, from which modules draw, are set from the seed; then they are as before."""
    device = torch.device(device)
    gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if gpu else []):
        torch.default_generator.manual_seed(seed)
        if gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within it the models are in evaluation mode; then every module of theirs has its own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def uncompiled() -> AbstractContextManager:
    """Within it compiled modules run as they were written: what is asked of a model once is not worth minutes of compilation."""
    import sys

    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
