"""`ours`: one whole optimisation step, and a whole run."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import smi
from smi import engine as engines
from smi.engine.dtype import choose_dtype
from smi.inversion.losses import default_losses
from smi.inversion.step import Step
from smi.kernels.image_step import image_step
from smi.models.vit import ViT, describe

from .cuda_graph import captured_step
from .saved_bytes import saved_bytes
from .step_inputs import StepInputs, make_inputs

ENGINE = "fused"  # the default of smi.invert, named so that it cannot turn into another unseen
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def make_step(
    model: nn.Module,
    batch: int,
    active: int,
    *,
    engine: str = ENGINE,
    dtype: str = "auto",
    seed: int = 0,
    update: str = "active",
    recompute: bool = False,
) -> Callable[[], Tensor]:
    """One optimisation step on static buffers: augmented forward on `active` patches of each of `batch` images, cross-entropy and total variation,
    pixel gradient, Adam, clip. Returns the loss.

    engine: "fused" or "reference". dtype: of the model's arithmetic; "auto" leaves it to the engine. update: "active" moves the pixels of the active
    patches, "all" every pixel. recompute: of the fused engine. The step has `images` [B, C, H, W] and `resolved`, what it runs in.
    """
    kind = {"fused": FusedStep, "reference": ReferenceStep}[engine]
    pixels = torch.float64 if dtype == "float64" else torch.float32
    options = {"recompute": True} if recompute else {}
    return kind(describe(model), make_inputs(model, batch, active, dtype=pixels, seed=seed), dtype, update, **options)


class FusedStep:
    """`smi.engine`'s step over the rows of the augmentation table; on CUDA one captured graph, as in a run."""

    def __init__(self, vit: ViT, inputs: StepInputs, dtype: str, update: str, recompute: bool = False):
        fused = engines.Fused(vit, dtype, recompute)
        self.images, device = inputs.images.clone(), inputs.images.device
        moments = torch.zeros_like(self.images), torch.zeros_like(self.images)
        losses = default_losses(inputs.tv_weight)
        about = {"lr": inputs.lr, "betas": inputs.betas, "update": update}
        self.step = Step(fused, self.images, moments, inputs.labels, inputs.index, losses, inputs.low, inputs.high, **about)
        self.row, self.count = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device)
        self.inputs, self.weights, self.value = inputs, fused.vit.tensors(), None
        self.dtype = str(fused.dtype).removeprefix("torch.")
        self.resolved = f"fused {self.dtype} ({fused.family.NAME})" + (", CUDA graph" if device.type == "cuda" else "")
        self.replay = captured_step(self.run, (self.images, *moments, self.row, self.count), device)

    def run(self) -> None:
        augmentation = self.inputs.table.index_select(0, self.row)[0]
        self.count += 1
        self.row.add_(1).remainder_(len(self.inputs.table))
        self.value = self.step.run(self.count, augmentation)

    def __call__(self) -> Tensor:
        self.replay()
        return self.value

    def kept_bytes(self) -> int:
        """What the engine counts of the blocks, and what autograd saves for the head and the loss. Takes a step."""
        head = saved_bytes(self.run, [self.images, *self.weights])
        return head + self.step.kept_bytes


class ReferenceStep:
    """The reference engine and the operation `image_step`, as `smi.inversion` calls them."""

    def __init__(self, vit: ViT, inputs: StepInputs, dtype: str, update: str):
        self.dtype = "float32" if dtype == "auto" else dtype
        self.vit, self.inputs = vit.to(inputs.images.device, DTYPES[self.dtype]), inputs
        self.images, self.index = inputs.images.clone(), inputs.index if update == "active" else None
        self.moments = torch.zeros_like(self.images), torch.zeros_like(self.images)
        self.losses = default_losses(inputs.tv_weight)
        self.resolved, self.t = f"reference {self.dtype}", 0

    def loss(self, pixels: Tensor) -> Tensor:
        inputs = self.inputs
        logits = engines.forward(self.vit, pixels, inputs.index, inputs.table[self.t % len(inputs.table)]).logits
        return sum(term(pixels, logits, inputs.labels) for term in self.losses)

    def __call__(self) -> Tensor:
        inputs = self.inputs
        pixels = self.images.detach().requires_grad_()
        loss = self.loss(pixels)
        (grad,) = torch.autograd.grad(loss, pixels)
        self.t += 1
        step = torch.tensor(self.t, device=pixels.device)
        image_step(
            self.images, grad, *self.moments, step, inputs.low, inputs.high, self.index, self.vit.patch_size, lr=inputs.lr, betas=inputs.betas
        )  # fmt: skip
        return loss.detach()

    def kept_bytes(self) -> int:
        return saved_bytes(lambda: self.loss(self.images.detach().requires_grad_()), self.vit.tensors())


def run_dtype(device: torch.device) -> str:
    """What `dtype="auto"` is on a device."""
    return str(choose_dtype(device)).removeprefix("torch.")


def invert(model: nn.Module, method: str, num_images: int, iterations: int, batch_size: int, **options) -> None:
    """A whole run by `smi.invert`, in the dtype that the engine chooses."""
    about = {"method": method, "num_images": num_images, "iterations": iterations, "batch_size": batch_size, "engine": ENGINE, "dtype": "auto"}
    smi.invert(model, progress=False, **about, **options)
