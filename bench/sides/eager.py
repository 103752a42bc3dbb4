"""`eager`: a step and a whole run as research code writes them, the waste included."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi.images.patches import to_patches
from smi.inversion import importance
from smi.inversion.schedules import Schedule
from smi.kernels.patch_embed.reference import moved_cells

from . import plain_operations
from .saved_bytes import saved_bytes
from .step_inputs import StepInputs, make_inputs


class EagerStep:
    """Research code, its waste included: weight gradients, every attention matrix, whole images, `.item()`."""

    def __init__(self, model: nn.Module, inputs: StepInputs, copy_model: bool = True):
        """copy_model: False converts the caller's model instead."""
        self.model = (copy.deepcopy(model) if copy_model else model).to(inputs.images.device, inputs.images.dtype).eval().requires_grad_()
        self.grid, self.patch_size = self.model.patch_embed.grid_size, self.model.patch_embed.patch_size[0]
        self.images = inputs.images.clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.images], lr=inputs.lr, betas=inputs.betas)
        self.index, self.labels, self.tv_weight = inputs.index, inputs.labels, inputs.tv_weight
        self.low, self.high = inputs.low.view(-1, 1, 1), inputs.high.view(-1, 1, 1)
        self.rows, self.t = inputs.table.tolist(), 0
        self.dtype = str(inputs.images.dtype).removeprefix("torch.")
        self.resolved = f"eager {self.dtype}"
        self.attentions: list[Tensor] = []  # of the last step, one [B, H, T, T] a layer

    def __call__(self) -> Tensor:
        row = self.rows[self.t % len(self.rows)]
        self.t += 1
        return self.run(*row)

    def run(self, dy: int, dx: int, flip: int) -> Tensor:
        """One step under one augmentation; the loss."""
        self.optimizer.zero_grad()
        self.model.zero_grad()
        loss = self.loss(dy, dx, flip)
        loss.backward()
        self.optimizer.step()
        self.images.data = torch.clamp(self.images.data, self.low, self.high)
        return torch.tensor(loss.item(), dtype=self.images.dtype)

    def loss(self, dy: int, dx: int, flip: int) -> Tensor:
        """Cross-entropy of the augmented images, total variation of the still ones."""
        images = self.images.roll((dy, dx), (2, 3))
        images = images.flip(3) if flip else images
        augmentation = torch.tensor([dy, dx, flip], device=self.index.device)
        logits, self.attentions = self.forward(images, moved_cells(self.index, self.grid, self.patch_size, augmentation))
        return F.cross_entropy(logits, self.labels) + self.tv_weight * plain_operations.tv_norms(self.images).sum()

    def forward(self, images: Tensor, cells: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the attention matrix of every layer."""
        model, attentions = self.model, []
        x = model._pos_embed(model.patch_embed(images))  # all patches
        prefix = torch.arange(model.num_prefix_tokens, device=cells.device).expand(len(cells), -1)
        kept = torch.cat([prefix, model.num_prefix_tokens + cells], 1)
        x = model.norm_pre(x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])))
        for block in model.blocks:
            y, attention = attend(block.attn, block.norm1(x))
            attentions.append(attention)
            x = x + block.ls1(y)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x)), attentions

    def cls_row(self) -> Tensor:
        """Attention of the CLS token to each active patch in the last block of the last step, mean over heads: [B, n]."""
        return self.attentions[-1].detach().mean(1)[:, 0, self.model.num_prefix_tokens :]

    def kept_bytes(self) -> int:
        return saved_bytes(lambda: self.loss(*self.rows[0]), [self.images, *self.model.parameters()])


def attend(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """timm's Attention written out: its output, and the matrix [B, H, T, T]."""
    batch, tokens, _ = x.shape
    q, k, v = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    attention = (attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)).softmax(-1)
    return attn.proj((attention @ v).transpose(1, 2).reshape(batch, tokens, -1)), attention


def make_step(model: nn.Module, batch: int, active: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, copy_model: bool = True) -> EagerStep:
    """The interface of `ours.make_step`. copy_model: False converts the caller's model instead of working on a copy."""
    return EagerStep(model, make_inputs(model, batch, active, dtype=dtype, seed=seed), copy_model)


def invert(
    model: nn.Module, schedule: Schedule, inputs: StepInputs, table: Tensor, on_stage: Callable[[int], None] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """A whole run over a schedule: (patches [B, n, C, p, p], index [B, n]) of every finished image, by stage.

    Patches are ranked by the last block's attention in the iteration before an event, which is not augmented. table: int [iterations, 3].
    on_stage: called with the active patches before every stage.
    """
    step = EagerStep(model, inputs)
    emitted, rows, still = [], table.tolist(), schedule.still_iterations()
    for stage in schedule.stages():
        if on_stage is not None:
            on_stage(stage.active)
        for t in range(stage.start, stage.stop):
            step.run(*([0, 0, 0] if t in still else rows[t]))
        if stage.event is not None:
            leaving, staying = importance.choose(step.cls_row(), stage.event.count, highest=stage.event.which == "highest")
            if stage.event.fate == "emit":
                emitted.append(finished(step, step.index.gather(1, leaving)))
            step.index = step.index.gather(1, staying)
    return [*emitted, finished(step, step.index)]


def finished(step: EagerStep, index: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [B, n, C, p, p] of the patches `index` [B, n], and the index."""
    patches = to_patches(step.images.detach(), step.patch_size)
    return patches[torch.arange(len(index), device=index.device)[:, None], index], index
