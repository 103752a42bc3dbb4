"""One update of a batch of trajectories within a stage: forward, loss, pixel gradient, Adam and clip, on memory that stays."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import reference
from ..engine.fused import Fused
from ..engine.reference import Output
from ..errors import InputError
from ..kernels.image_step import image_step, tv_norms
from ..models.description import ViT
from ..models.levels import Model
from ..models.module import Classifier
from .losses import Loss, cross_entropy, needs_attention_outputs, total


class Step:
    """Call `run` once an iteration. images [B, C, H, W] and the moments are updated in place; `output` is the pass that the update came from.

    engine: a Fused, a ViT for the reference, or a Classifier, which runs its own modules. index: int64 [B, n], the active patches. losses: their sum
    is minimised; total variation, whose gradient the update itself adds, is told by its attribute `tv_weight`. low, high: [C], valid range. update:
    "active" leaves the pixels of patches that left as they are; "all" moves every pixel at which there is a gradient or momentum, as published code
    does. chunk: trajectories whose forward and backward pass run together, None for all.
    """

    def __init__(
        self,
        engine: Fused | Model,
        images: Tensor,
        moments: tuple[Tensor, Tensor],
        labels: Tensor,
        index: Tensor,
        losses: Sequence[Loss],
        low: Tensor,
        high: Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        update: str = "active",
        chunk: int | None = None,
    ):
        self.engine: Any = engine
        self.fused = isinstance(engine, Fused)
        self.vit: Model = engine.vit if isinstance(engine, Fused) else engine
        self.images, self.moments, self.labels, self.index = images, moments, labels, index
        self.losses, self.tv_weight = (list(losses), 0.0) if isinstance(engine, ViT) else _split(losses)
        self.low, self.high, self.lr, self.betas = low, high, lr, betas
        self.moved = index if update == "active" else None
        size = len(images) if chunk is None else chunk
        self.chunks = [slice(start, start + size) for start in range(0, len(images), size)]
        self.workspace = engine.workspace() if isinstance(engine, Fused) else None
        self.grad = torch.empty_like(images)
        self.norms = images.new_zeros(4)
        self.kept_bytes = 0
        self.output: Any = None  # an Output, once there was a pass

    def run(self, count: Tensor, augmentation: Tensor) -> Tensor:
        """Make one update; count: int scalar, 1 for the first of the run, and augmentation: int [3], both read on the device. Returns the loss []."""
        if self.tv_weight:
            self.norms = tv_norms(self.images)
        loss = self._gradient(augmentation)
        if self.tv_weight:
            loss = loss + self.tv_weight * self.norms.sum()
        with torch.no_grad():
            image_step(
                self.images, self.grad, *self.moments, count, self.low, self.high, self.moved, self.vit.patch_size,
                self.norms if self.tv_weight else None, self.tv_weight, lr=self.lr, betas=self.betas,
            )  # fmt: skip
        return loss

    def _gradient(self, augmentation: Tensor) -> Tensor:
        """Loss without total variation; its gradient goes to `grad`, the model's results to `output`."""
        if not self.fused:
            return self._autograd_gradient(augmentation)
        if len(self.chunks) > 1:
            return self._gradient_in_chunks(augmentation)
        self.output, _, saved = self.engine.forward(self.images, self.index, augmentation, self.workspace)
        self.kept_bytes = self.kept_bytes or saved.bytes()
        loss, grad_logits, grad_images = self._loss_gradients(self.output.logits)
        self.grad = self.engine.backward(saved, grad_logits, self.grad)  # written there, or new: a copy would cost as much as the update
        if grad_images is not None:
            self.grad += grad_images
        return loss

    def _gradient_in_chunks(self, augmentation: Tensor) -> Tensor:
        """Two forward passes, one for the loss and one for its gradient, because a loss may depend on the whole batch."""
        parts = [self.engine.forward(self.images[c], self.index[c], augmentation, self.workspace, save=False)[0] for c in self.chunks]
        self.output = Output(torch.cat([part.logits for part in parts]), torch.cat([part.attention for part in parts]))
        loss, grad_logits, grad_images = self._loss_gradients(self.output.logits)
        for chunk in self.chunks:
            _, _, saved = self.engine.forward(self.images[chunk], self.index[chunk], augmentation, self.workspace)
            self.kept_bytes = max(self.kept_bytes, saved.bytes())
            out = self.grad[chunk]
            found = self.engine.backward(saved, grad_logits[chunk], out)
            if found is not out:
                out.copy_(found)
        if grad_images is not None:
            self.grad += grad_images
        return loss

    def _loss_gradients(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss, its gradient in the logits, and that in the images as far as it does not come through the model; None where there is none."""
        with torch.enable_grad():
            pixels, logits = self.images.detach().requires_grad_(), logits.detach().requires_grad_()
            loss = total(self.losses, pixels, logits, self.labels, None)
            check(loss)
            grad_logits, grad_images = torch.autograd.grad(loss, [logits, pixels], allow_unused=True)
        return loss.detach(), torch.zeros_like(logits) if grad_logits is None else grad_logits, grad_images

    @torch.enable_grad()
    def _autograd_gradient(self, augmentation: Tensor) -> Tensor:
        pixels = self.images.detach().requires_grad_()
        wanted: list[Tensor] | None = [] if any(map(needs_attention_outputs, self.losses)) else None
        if isinstance(self.vit, Classifier):
            logits = self.vit.forward(pixels, augmentation)
            self.output = Output(logits, logits.new_empty(len(logits), 0))  # no patches are ranked
        else:
            self.output = reference.forward(self.vit, pixels, self.index, augmentation, wanted)
        loss = total(self.losses, pixels, self.output.logits, self.labels, wanted)
        check(loss)
        (grad,) = torch.autograd.grad(loss, pixels)
        self.grad.copy_(grad)
        return loss.detach()


def check(loss: Any) -> None:
    """Raise InputError unless a sum of losses is something to differentiate."""
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
        raise InputError("every loss must return one number that depends on the images or the logits")


def _split(losses: Sequence[Loss]) -> tuple[list[Loss], float]:
    """The losses without total variation, and its weight: the update adds its gradient in the pass that moves the pixels."""
    weights = [getattr(loss, "tv_weight", None) for loss in losses]
    rest = [loss for loss, weight in zip(losses, weights, strict=True) if weight is None]
    return rest or [_nothing], float(sum(weight for weight in weights if weight is not None))


def _nothing(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Total variation alone is minimised: the model takes no part."""
    return 0 * logits.sum()


def is_standard(losses: Sequence[Loss]) -> bool:
    """Whether losses are only cross-entropy and total variation, which a CUDA graph can hold; a user's function might wait for the device."""
    return all(loss is cross_entropy or getattr(loss, "tv_weight", None) is not None for loss in losses)
