"""A CUDA device that is not there. Within `fake_device` tensors on "cuda" have shapes and no memory, Triton compiles for the device and launches
nothing, streams and graphs of torch.cuda are stubs, and a Recording says what a real device would have been given.

Autograd needs a device to differentiate on. `torch.autograd.grad` is answered with tensors of the right shapes, and the nodes of its graph are noted
as kernels. Only the loss and the tail of the model, a few tokens an image, are differentiated so.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode

from smi.models.vit import ViT

from .recording import Launch, Operation, Recording, Watch

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Device:
    """What programs ask a device for. Sizes in bytes."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared_per_block: int
    memory: int
    l2: int


H200 = Device("NVIDIA H200", (9, 0), 132, 232448, 140 << 30, 60 << 20)
A10 = Device("NVIDIA A10", (8, 6), 72, 101376, 22 << 30, 6 << 20)


@contextmanager
def fake_device(device: Device = H200, compile_kernels: bool = False) -> Iterator[Recording]:
    """Within it `device` is there, as told above. compile_kernels: whether each kernel is compiled, and its machine code noted. Triton must not
    interpret: TRITON_INTERPRET is read when kernels are defined."""
    recording = Recording()
    with ExitStack() as stack:
        for target, name, value in _stubs(device, recording, compile_kernels):
            stack.enter_context(patch.object(target, name, value, create=not hasattr(target, name)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Watch(recording))
        yield recording


def _stubs(device: Device, recording: Recording, compile_kernels: bool) -> Iterator[tuple[Any, str, Any]]:
    """(what, attribute, its stub)."""
    import triton
    from triton.runtime.jit import JITFunction

    yield triton.runtime.driver, "_active", _driver(device)
    yield JITFunction, "run", _run(device, recording, compile_kernels)
    yield CustomOpDef, "__call__", lambda op, *args: op._init_fn(*args)  # the operation itself: a fake tensor would be given to its fake kernel
    yield torch.autograd, "grad", _gradient(recording)
    yield ViT, "weight_hash", lambda vit: "weights of a fake tensor"
    properties = SimpleNamespace(
        name=device.name, major=device.capability[0], minor=device.capability[1], multi_processor_count=device.processors,
        shared_memory_per_block_optin=device.shared_per_block, total_memory=device.memory, L2_cache_size=device.l2,
    )  # fmt: skip
    values = {  # not is_available: autograd would then ask the driver for a stream
        "device_count": 1, "current_device": 0, "get_device_capability": device.capability,
        "get_device_properties": properties, "get_device_name": device.name, "mem_get_info": (device.memory, device.memory),
        "memory_reserved": 0, "memory_allocated": 0, "empty_cache": None,
    }  # fmt: skip
    for name, value in values.items():
        yield torch.cuda, name, functools.partial(lambda value, *args, **kwargs: value, value)
    yield torch.cuda, "is_current_stream_capturing", lambda: recording.capturing
    yield torch.cuda, "synchronize", lambda *args: recording.wait("torch.cuda.synchronize")
    for name in ("device", "stream", "Stream", "Event"):
        yield torch.cuda, name, Nothing
    yield torch.cuda, "current_stream", Nothing
    yield torch.cuda, "graph", functools.partial(Capture, recording)
    yield torch.cuda, "CUDAGraph", functools.partial(Graph, recording)


class Nothing:
    """A stream, or a context that makes one current."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        """As of torch.cuda.Stream."""


class Graph:
    """A graph that counts its replays."""

    def __init__(self, recording: Recording, *args: Any, **kwargs: Any):
        self.recording = recording

    def replay(self) -> None:
        self.recording.replays += 1


class Capture(Nothing):
    """torch.cuda.graph: what is launched within it is a step of the recording."""

    def __init__(self, recording: Recording, *args: Any, **kwargs: Any):
        self.recording = recording

    def __enter__(self) -> "Capture":
        self.recording.begin()
        return self

    def __exit__(self, *error: object) -> None:
        self.recording.end()


def _driver(device: Device) -> Any:
    from triton.backends.compiler import GPUTarget

    major, minor = device.capability
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda index: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )


def _run(device: Device, recording: Recording, compile_kernels: bool) -> Callable:
    """In place of JITFunction.run: note the launch, compile, launch nothing."""
    from triton.runtime.jit import JITFunction, MockTensor

    plain_run = JITFunction.run

    def mock(value: Any) -> Any:
        return MockTensor(value.dtype) if isinstance(value, Tensor) else value

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **given: Any) -> None:
        options = {name: given[name] for name in OPTIONS if name in given}
        constants = {name: value for name, value in given.items() if name not in OPTIONS}
        launch = Launch(kernel.fn.__name__, tuple(grid), dict(zip(kernel.arg_names, args, strict=False)) | constants, options)
        recording.launch(launch)
        if compile_kernels:
            launch.compiled = plain_run(kernel, *map(mock, args), grid=grid, warmup=True, **{name: mock(value) for name, value in given.items()})
            shared = launch.compiled.metadata.shared
            if shared > device.shared_per_block:
                recording.problems.append(f"{launch.name} needs {shared} bytes of shared memory, {device.shared_per_block} fit")

    return run


def _gradient(recording: Recording) -> Callable:
    """In place of torch.autograd.grad: gradients of the right shapes. Each node that computes is noted as a kernel."""

    def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> tuple[Tensor | None, ...]:
        wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        first, *_ = outputs if isinstance(outputs, tuple | list) else [outputs]
        nodes = list(_nodes(first.grad_fn))
        recording.kernels += [Operation(node.name(), _node_bytes(node), _node_flops(node)) for node in nodes if _computes(node.name())]
        reached = {id(node.variable) for node in nodes if hasattr(node, "variable")}
        return tuple(torch.empty_like(x) if id(x) in reached else None for x in wanted)

    return grad


VIEW_NODES = ("View", "Select", "T0", "Unsqueeze", "Expand", "Transpose", "Permute", "Alias", "Unbind", "Reshape", "torch::autograd::AccumulateGrad")


def _computes(name: str) -> bool:
    return not any(name.removeprefix("Unsafe").startswith(view) for view in VIEW_NODES if view != "T0") and name != "TBackward0"


def _nodes(node: Any) -> Iterator[Any]:
    """The graph from a node on, each node once."""
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def _node_bytes(node: Any) -> int:
    """Of the gradients that go in, once read and once written."""
    return sum(2 * prod(each.shape) * each.dtype.itemsize for each in node._input_metadata)


def _node_flops(node: Any) -> int:
    """Of a linear layer's: the gradient of its input alone, because weights are frozen."""
    weight = getattr(node, "_saved_mat2", None)
    return 0 if weight is None else 2 * node._input_metadata[0].shape[0] * prod(weight.shape)
