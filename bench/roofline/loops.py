"""The inversion loop, whole or one step of it, on a fake device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import nn

from smi.engine import Fused
from smi.images.sparse_images import SparseImages
from smi.inversion.graph import Runner
from smi.inversion.loop import run_batches
from smi.inversion.losses import default_losses
from smi.inversion.prepare import prepare
from smi.inversion.settings import Settings
from smi.inversion.step import Step
from smi.kernels.versions import forced
from smi.models.vit import describe

from ..sides.step_inputs import make_inputs
from .fake_device import H200, Device, fake_device
from .recording import Launch, Operation, Recording

CUDA = "cuda:0"  # with its number: the current one would be asked of the driver


@contextmanager
def _loaded(model: str, version: str, device: Device, compile_kernels: bool, options: dict[str, Any]) -> Iterator[tuple[Recording, nn.Module]]:
    """A recording on a fake device, and timm's model of that name without values, on the CPU. version: of every operation."""
    with torch.device("meta"):
        made = timm.create_model(model, **options).eval()
    with fake_device(device, compile_kernels) as recording, forced(version):
        yield recording, made.to_empty(device="cpu")


def record_inversion(
    model: str,
    version: str = "triton",
    device: Device = H200,
    compile_kernels: bool = False,
    model_options: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Recording, SparseImages]:
    """What `smi.invert` with these settings gives to the device, and the images, without values, that it returns."""
    with _loaded(model, version, device, compile_kernels, model_options or {}) as (recording, made):
        return recording, SparseImages.cat([part for _, part in run_batches(prepare(made, Settings(device=CUDA, **settings)))])


def record_step(model: str, active: int, batch: int, version: str = "triton", device: Device = H200) -> list[Launch | Operation]:
    """The kernels, compiled, of one captured step: `active` patches of each of `batch` images. Raises RuntimeError where the device would refuse."""
    with _loaded(model, version, device, True, {}) as (recording, made):
        vit = describe(made).to(torch.device(CUDA), torch.float32)
        inputs = make_inputs(vit, batch, active)
        moments = torch.zeros_like(inputs.images), torch.zeros_like(inputs.images)
        step = Step(
            Fused(vit), inputs.images, moments, inputs.labels, inputs.index, default_losses(inputs.tv_weight), inputs.low, inputs.high,
            lr=inputs.lr, betas=inputs.betas,
        )  # fmt: skip
        Runner(step, inputs.table, torch.zeros(len(inputs.table), device=CUDA), 0)
    if recording.problems:
        raise RuntimeError("; ".join(recording.problems))
    return recording.steps[0]
