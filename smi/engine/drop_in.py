"""The fused engine behind existing calls: that of published research code's module, and a timm model's own.

before   logits, attentions, index = model(images, current_abs_index, next_relative_index)
after    model = smi.drop_in(model), and the same line

before   logits = model(images)
after    model = smi.accelerate(model), and the same line
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.unwrap import peel, unwrapped
from ..models.vit import describe
from ..plain import dense
from ..surroundings import door, neutral
from .fused import Fused


class _FusedLogits(torch.autograd.Function):
    """Logits [B, classes] and the CLS token's attention [B, H, T] in the last block, differentiable in the images through the logits alone."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, fused: Fused, index: Tensor) -> tuple[Tensor, Tensor]:
        output, weights, ctx.saved = fused.forward(images.detach().float(), index, save=ctx.needs_input_grad[0])
        ctx.fused, ctx.dtype = fused, images.dtype
        row = weights[:, :, 0]
        ctx.mark_non_differentiable(row)
        return output.logits, row

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logits: Tensor, _: Any) -> tuple[Tensor, None, None]:
        if ctx.saved is None:
            raise RuntimeError("this pass was differentiated before and its saved activations are freed: call the model again")
        saved, ctx.saved = ctx.saved, None
        with neutral(grad=None):
            return ctx.fused.backward(saved, grad_logits.contiguous()).to(ctx.dtype), None, None


def fused_logits(fused: Fused, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, classes] and CLS attention [B, H, T] by the fused engine as one autograd node, for losses of one's own."""
    return _FusedLogits.apply(images, fused, index)


class _FusedModule(nn.Module):
    """What both wrappers share: a frozen copy of the model, `model`, whose parameters and state are the wrapper's; and the engine, which is made
    again when they move or change."""

    def __init__(self, model: nn.Module, dtype: str):
        super().__init__()
        _leave_to_the_engine(type(self))
        self._dtype = dtype
        self._fused: Fused | None = None
        self._made_for: tuple = ()
        with door():
            vit = describe(model)
            self.model = copy.deepcopy(peel(model)).eval().requires_grad_(False)
            self._fused, self._made_for = Fused(vit.to(vit.device, torch.float32, copy=True), dtype), self._now()
        self.num_classes, self.pretrained_cfg = vit.num_classes, getattr(unwrapped(model), "pretrained_cfg", {})

    def _engine(self) -> Fused:
        if self._fused is None or self._made_for != self._now():
            with door(), torch.no_grad():
                vit = describe(self.model)
                self._fused, self._made_for = Fused(vit.to(vit.device, torch.float32, copy=True), self._dtype), self._now()
        return self._fused

    def _now(self) -> tuple:
        """What tells that the copy moved or changed: load_state_dict and changes in place count."""
        held = [*self.model.parameters(), *self.model.buffers()]
        return held[0].device, sum(tensor._version for tensor in held)

    def _check(self, images: Tensor) -> None:
        vit, images = self._engine().vit, dense("images", images)
        shape = (vit.channels, *vit.image_size)
        if images.ndim != 4 or images.shape[1:] != shape:
            raise InputError(f"images must be [B, {', '.join(map(str, shape))}] for this model, got {list(images.shape)}")

    def _logits(self, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, classes] and CLS attention [B, H, T] of images as the model takes them."""
        vit = self._engine().vit
        if vit.normalises:
            mean, std = (torch.tensor(values).to(images).view(-1, 1, 1) for values in (vit.mean, vit.std))
            images = (images - mean) / std
        return fused_logits(self._engine(), images, index)

    def train(self, mode: bool = True) -> Any:
        """As of any module; the copy computes as in evaluation mode always."""
        super().train(mode)
        self.model.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise InputError("the weights are frozen, logits are differentiable in the images alone: train the model itself")
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the engine, which a copy makes for itself."""
        return {**self.__dict__, "_fused": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _leave_to_the_engine(type(self))


def _leave_to_the_engine(kind: Any) -> None:
    """Let torch.compile call a wrapper as it is: the engine is compiled already. Done when the first is made: it imports the compiler."""
    if "_torchdynamo_disable" not in vars(kind.forward):
        kind.forward = torch.compiler.disable(kind.forward)


class DropIn(_FusedModule):
    """See `drop_in`."""

    def forward(
        self, images: Tensor, current_abs_index: Tensor | None = None, next_relative_index: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Logits [B, classes], attentions with the last block's CLS row last, and the index [B, 1 + n] that was used."""
        self._check(images)
        with neutral(grad=None):
            index = _index(current_abs_index, next_relative_index, len(images), self._engine().vit.num_patches, images.device)
            logits, row = self._logits(images, index[:, 1:] - 1)
            prefix = self._engine().vit.num_prefix
            row = torch.cat([row[..., :1] if prefix else row.new_zeros(*row.shape[:2], 1), row[..., prefix:]], dim=-1)
            return logits, [row[:, :, None]], index


def _index(current: Tensor | None, relative: Tensor | None, batch: int, patches: int, device: torch.device) -> Tensor:
    """The absolute index [B, 1 + n]; 0 is the CLS token, patches count from 1."""
    if current is None:
        current = torch.arange(patches + 1, device=device).expand(batch, -1)
    if current.ndim != 2 or len(current) != batch or not bool((current[:, 0] == 0).all()):
        raise InputError(f"current_abs_index must be [{batch}, 1 + n] and begin with 0, the CLS token, got {list(current.shape)}")
    if relative is not None and relative.shape[1] != current.shape[1]:
        current = current.gather(1, relative.long())
    if current.shape[1] < 2 or int(current[:, 1:].min()) < 1 or int(current.max()) > patches:
        raise InputError(f"current_abs_index must name patches from 1 to {patches}, got {int(current[:, 1:].min())} to {int(current.max())}")
    return current.long()


def drop_in(model: nn.Module, dtype: str = "auto") -> DropIn:
    """A timm ViT behind the call of published research code, computed by the fused engine.

        logits, attentions, index = module(images, current_abs_index, next_relative_index)

    images: already augmented, [B, C, H, W]; current_abs_index: int [B, 1 + n], 0 for CLS and patches counted from 1, None for all;
    next_relative_index: int [B, 1 + m], positions in current_abs_index; where it has another length, current_abs_index is gathered by it first.
    attentions[-1]: [B, heads, 1, 1 + n], of which `.mean(dim=1)[:, 0, 1:]` is what the CLS token pays to each patch in the last block; no gradient.
    index: the absolute index that was used. Logits are differentiable in the images, once. dtype: "auto", "float32", "bfloat16" or "float16".
    Weights are frozen as they are now. Raises InputError for a model or arguments that do not fit.
    """
    return DropIn(model, dtype)


class Accelerated(_FusedModule):
    """See `accelerate`."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        self._check(images)
        with neutral(grad=None):
            index = torch.arange(self._engine().vit.num_patches, device=images.device).expand(len(images), -1)
            return self._logits(images, index)[0]


def accelerate(model: nn.Module, dtype: str = "auto") -> Accelerated:
    """A timm ViT behind its own call, logits = module(images), computed by the fused engine.

    images: [B, C, H, W]. Logits [B, classes] are differentiable in the images, once. Weights are frozen as they are now; to train them, use the model
    itself. dtype and errors as in `drop_in`.
    """
    return Accelerated(model, dtype)
