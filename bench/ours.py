"""Our side of every comparison: one whole optimisation step, a whole run, and what a step keeps for backward."""

from collections.abc import Callable

import torch
from smi.kernels.image_step import image_step
from torch import Tensor, nn

import smi
from smi import engine as engines
from smi.losses import default_losses
from smi.models import ViT, describe

from .start import Start, make_start

DEFAULT_ENGINE = "fused" if hasattr(engines, "Step") else "reference"  # rows say which
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def make_step(
    model: nn.Module, batch: int, active: int, *, engine: str = DEFAULT_ENGINE, dtype: str = "auto", seed: int = 0, update: str = "active"
) -> Callable[[], Tensor]:
    """One optimisation step on static buffers: augmented forward on `active` patches of each of `batch` images, cross-entropy and total variation,
    pixel gradient, Adam, clip. Returns the loss.

    engine: "fused" or "reference". dtype: of the model's arithmetic, "auto" leaves it to the engine. update: "active" moves the pixels of the active
    patches, "all" every pixel. The step has `images` [B, C, H, W] and `resolved`, what it runs in.
    """
    kind = {"fused": FusedStep, "reference": ReferenceStep}[engine]
    pixels = torch.float64 if dtype == "float64" else torch.float32
    return kind(describe(model), make_start(model, batch, active, dtype=pixels, seed=seed), dtype, update)


class FusedStep:
    """`smi.engine.Step` over the rows of the augmentation table."""

    def __init__(self, vit: ViT, start: Start, dtype: str, update: str):
        about = {"tv_weight": start.tv_weight, "lr": start.lr, "betas": start.betas}
        self.step = engines.Step(vit, start.images, start.labels, start.index, **about, engine="fused", dtype=dtype, update=update)
        self.table, self.t = start.table, 0

    @property
    def images(self) -> Tensor:
        return self.step.images

    @property
    def dtype(self) -> str:
        return str(getattr(self.step, "dtype", "auto")).removeprefix("torch.")

    @property
    def resolved(self) -> str:
        return f"fused {self.dtype}"

    def __call__(self) -> Tensor:
        loss = self.step.run(self.table[self.t % len(self.table)], self.t)
        self.t += 1
        return loss

    def kept_bytes(self) -> int:
        return self.step.kept_bytes()


class ReferenceStep:
    """The reference engine and the operation `image_step`, as `smi.inversion` calls them."""

    def __init__(self, vit: ViT, start: Start, dtype: str, update: str):
        self.dtype = "float32" if dtype == "auto" else dtype
        self.vit, self.start = vit.to(start.images.device, DTYPES[self.dtype]), start
        self.images, self.index = start.images.clone(), start.index if update == "active" else None
        self.moments = torch.zeros_like(self.images), torch.zeros_like(self.images)
        self.losses = default_losses(start.tv_weight)
        self.resolved, self.t = f"reference {self.dtype}", 0

    def loss(self, pixels: Tensor) -> Tensor:
        start = self.start
        logits = engines.forward(self.vit, pixels, start.index, start.table[self.t % len(start.table)]).logits
        return sum(term(pixels, logits, start.labels) for term in self.losses)

    def __call__(self) -> Tensor:
        start = self.start
        pixels = self.images.detach().requires_grad_()
        loss = self.loss(pixels)
        (grad,) = torch.autograd.grad(loss, pixels)
        self.t += 1
        step = torch.tensor(self.t, device=pixels.device)
        image_step(
            self.images, grad, *self.moments, step, start.low, start.high, self.index, self.vit.patch_size, lr=start.lr, betas=start.betas
        )  # fmt: skip
        return loss.detach()

    def kept_bytes(self) -> int:
        from .memory import saved_bytes

        return saved_bytes(lambda: self.loss(self.images.detach().requires_grad_()), self.vit.tensors())


def invert(model: nn.Module, method: str, num_images: int, iterations: int, batch_size: int, engine: str = DEFAULT_ENGINE, **options) -> None:
    """A whole run by `smi.invert`, in the dtype that the engine chooses."""
    if engine != "reference":
        options |= {"engine": engine, "dtype": "auto"}
    smi.invert(model, method=method, num_images=num_images, iterations=iterations, batch_size=batch_size, progress=False, **options)
