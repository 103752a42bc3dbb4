"""The calls that an optimisation step of the engine makes: every raw function with its arguments, recorded while one step runs.

On a device the arguments are those of the step, computed by stock PyTorch. On "meta" they are shapes and dtypes alone: nothing is computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smi.engine import Fused
from smi.inversion.losses import default_losses
from smi.inversion.step import Step
from smi.kernels import versions
from smi.kernels.layers import dispatched
from smi.kernels.verification import short
from smi.models.vit import ViT, describe

from ..sides.step_inputs import make_inputs


@dataclass
class Call:
    """Raw `function` of an operation on `args`; `written` are the places of those written in place; a step makes `count` alike."""

    operation: str
    function: str
    args: tuple
    written: tuple[int, ...]
    count: int = 1

    @property
    def name(self) -> str:
        """For example "attention forward 128x47x3x12x64 bfloat16"."""
        shapes = [f"{'x'.join(map(str, arg.shape))} {short(arg.dtype)}" for arg in self.args if isinstance(arg, Tensor) and arg.ndim > 1]
        return f"{self.operation} {self.function} {', '.join(dict.fromkeys(shapes))}"

    def fresh(self) -> tuple:
        """The arguments, those written in place as copies."""
        return tuple(arg.clone() if i in self.written and arg is not None else arg for i, arg in enumerate(self.args))


def build_vit(model: str, device: torch.device, dtype: torch.dtype, **options) -> ViT:
    """A timm model with random weights, described, on a device."""
    torch.manual_seed(0)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        network = timm.create_model(model, **options).eval()
    return describe(network).to(device, dtype)


def make_step(vit: ViT, batch: int, active: int, dtype: torch.dtype) -> tuple[Step, Tensor, Tensor]:
    """An update of `batch` images with `active` patches each, and what its `run` takes: the number of the update, the augmentation."""
    inputs = make_inputs(vit, batch, active)
    moments = torch.zeros_like(inputs.images), torch.zeros_like(inputs.images)
    about = {"lr": inputs.lr, "betas": inputs.betas}
    losses, index = default_losses(inputs.tv_weight), inputs.index
    step = Step(Fused(vit, dtype), inputs.images.clone(), moments, inputs.labels, index, losses, inputs.low, inputs.high, **about)
    return step, torch.ones((), dtype=torch.int64, device=vit.device), inputs.table[0]


def record(vit: ViT, batch: int, active: int, dtype: torch.dtype = torch.bfloat16) -> list[Call]:
    """The calls of one step, those alike once, in the order of the step."""
    step, count, augmentation = make_step(vit, batch, active, dtype)
    recorder = Recorder()
    with versions.forced("stock"), through_registered_operations(), recorder:
        step.run(count, augmentation)
    return list(recorder.calls.values())


class Recorder(TorchDispatchMode):
    """Keeps the first of all alike calls of our registered operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple, Call] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "smi":
            operation, function = raw_function(func._schema.name.removeprefix("smi::"))
            written = tuple(i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
            key = (operation, function, *map(likeness, args))
            if key in self.calls:
                self.calls[key].count += 1
            else:
                call = Call(operation, function, args, written)
                self.calls[key] = Call(operation, function, call.fresh(), written)
        return func(*args, **(kwargs or {}))


def raw_function(name: str) -> tuple[str, str]:
    """Operation and raw function of a registered operation: "linear_residual_backward_gelu" is backward_gelu of linear_residual."""
    operation = max((o for o in versions.OPERATIONS if f"{name}_".startswith(f"{o}_")), key=len)
    return operation, name[len(operation) + 1 :] or "forward"


def likeness(arg: object) -> object:
    return (arg.shape, arg.stride(), arg.dtype) if isinstance(arg, Tensor) else arg


@contextmanager
def through_registered_operations() -> Iterator[None]:
    """Within it the layers call the registered operations, which a dispatch mode sees and which take "meta" tensors, instead of the dispatcher."""

    def call(operation: str, function: str, *args):
        return getattr(torch.ops.smi, operation if function == "forward" else f"{operation}_{function}")(*args)

    before = dispatched.call
    dispatched.call = call
    try:
        yield
    finally:
        dispatched.call = before
