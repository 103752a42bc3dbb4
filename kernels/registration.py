"""Registers the raw functions of an operation as torch custom ops, once, with their fake kernels.

The fake gives the schema too, so that arguments, dtypes and shapes are stated in one place. Every version has the fake's arguments and results; which
one runs is decided inside the custom op, at every call, where neither torch.compile nor autograd sees it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op, infer_schema

from . import dispatch, versions


def register(operation: str, function: str, fake: Callable, reference: Callable, mutates: Sequence[str] = ()) -> CustomOpDef:
    """Custom op `smi::{operation}` for function "forward", `smi::{operation}_{function}` for any other.

    fake: typed; returns empty tensors of the results' shapes and dtypes, None where all results are in `mutates`. reference: same arguments, the
    version that `dispatch` calls "reference". mutates: names of the arguments written in place. No result may be or alias an argument.
    """
    versions.set_reference(operation, function, reference)
    name = f"smi::{operation}" if function == "forward" else f"smi::{operation}_{function}"
    schema = infer_schema(fake, mutates_args=mutates)
    op = custom_op(name, lambda *args: dispatch.call(operation, function, *args), mutates_args=mutates, schema=schema)
    op.register_fake(fake)
    return op


def gradients(function: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs)` in those inputs, by autograd: how references differentiate.

    grads: one per result of `function`, None for a result that the loss does not use. Returns one contiguous gradient per input.
    torch.func and not torch.autograd, because autograd is switched off inside a custom op.
    """
    results, pull_back = torch.func.vjp(lambda *leaves: _as_tuple(function(*leaves)), *inputs)
    found = pull_back(tuple(torch.zeros_like(y) if g is None else g for y, g in zip(results, grads, strict=True)))
    return tuple(gradient.contiguous() for gradient in found)


def _as_tuple(results) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def refuse_trainable(operation: str, **weights: Tensor | None) -> None:
    """Raise ValueError where a weight wants a gradient: these operations differentiate in their inputs only."""
    if not torch.is_grad_enabled():
        return
    for name, weight in weights.items():
        if weight is not None and weight.requires_grad:
            raise ValueError(f"{operation} gives no gradient for {name}: detach it, or use PyTorch's own operations to train weights")


def expect(operation: str, condition: bool, message: str) -> None:
    """Raise ValueError with the operation's name unless `condition`."""
    if not condition:
        raise ValueError(f"{operation}: {message}")
