"""`compiled`: the best step that stock PyTorch gives."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi.engine.dtype import choose_dtype
from smi.kernels.patch_embed.reference import moved_cells, source_pixels
from smi.models.vit import describe

from .cuda_graph import captured_step
from .probe import seconds_of
from .saved_bytes import saved_bytes
from .step_inputs import StepInputs, make_inputs

EPS = 1e-8  # of Adam
COMPILED, PLAIN = "torch.compile", "not compiled"


class CompiledStep:
    """Stock PyTorch at its best: timm's blocks with SDPA, frozen, compiled, and on CUDA the whole step in one graph."""

    def __init__(self, model: nn.Module, inputs: StepInputs, dtype: torch.dtype, variant: str):
        device = inputs.images.device
        self.model = copy.deepcopy(model).to(device, dtype).eval().requires_grad_(False)
        self.vit, self.inputs = describe(self.model), inputs
        self.images = inputs.images.clone()
        self.moments = torch.zeros_like(self.images), torch.zeros_like(self.images)
        self.row, self.step = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros((), dtype=torch.float64, device=device)
        self.dtype, self.variant = str(dtype).removeprefix("torch."), variant
        self.resolved = f"{variant} {self.dtype}" + (", CUDA graph" if device.type == "cuda" else "")
        self._update, self._loss = update, self._cross_entropy
        if variant == COMPILED:
            self._update = torch.compile(update, dynamic=False)
            if device.type == "cuda":
                self._loss, self.gather, self.spread = (torch.compile(f, dynamic=False) for f in (self._cross_entropy, self.gather, self.spread))
            else:  # block by block: one compilation serves all of them, a twelfth of the time
                for block in self.model.blocks:
                    block.compile(dynamic=False)
        self.value = None
        self.replay = captured_step(self.run, (self.images, *self.moments, self.row, self.step), device)

    def __call__(self) -> Tensor:
        self.replay()
        return self.value

    def run(self) -> None:
        inputs = self.inputs
        augmentation = inputs.table.index_select(0, self.row)[0]
        patches, source, cells = self.gather(augmentation)
        loss = self._loss(patches.requires_grad_(), cells)
        (grad,) = torch.autograd.grad(loss, patches)
        self.step += 1
        self.row.add_(1).remainder_(len(inputs.table))
        norms = self._update(self.images, self.spread(grad, source), *self.moments, self.step, inputs.low, inputs.high, inputs)
        self.value = loss.detach() + inputs.tv_weight * norms.sum()

    def gather(self, augmentation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [B, n, C * p * p] under the cells [B, n] to which the active patches moved, and where in the still image they lie."""
        vit, images = self.vit, self.images
        cells = moved_cells(self.inputs.index, vit.grid, vit.patch_size, augmentation)
        source = source_pixels(cells, vit.grid, vit.patch_size, augmentation).long().flatten(1)[:, None].expand(-1, vit.channels, -1)
        pixels = images.flatten(2).gather(2, source).unflatten(2, (cells.shape[1], -1))
        return pixels.transpose(1, 2).flatten(2), source, cells

    def spread(self, grad: Tensor, source: Tensor) -> Tensor:
        """The gradient of whole images from that of the gathered pixels, each of which was read once."""
        batch, n, _ = grad.shape
        grad = grad.view(batch, n, self.vit.channels, -1).transpose(1, 2).flatten(2)
        return torch.zeros_like(self.images).flatten(2).scatter_(2, source, grad).view_as(self.images)

    def _cross_entropy(self, patches: Tensor, cells: Tensor) -> Tensor:
        vit, model = self.vit, self.model
        tokens = F.linear(patches.to(vit.embed.weight.dtype), vit.embed.weight, vit.embed.bias)
        if vit.position is not None:
            tokens = tokens + vit.position[cells]
        x = model.norm_pre(torch.cat([vit.prefix.expand(len(tokens), -1, -1), tokens], 1))
        for block in model.blocks:
            x = block(x)
        logits = model.forward_head(model.norm(x))
        return F.cross_entropy(logits.to(patches.dtype), self.inputs.labels)

    def kept_bytes(self) -> int:
        patches, _, cells = self.gather(self.inputs.table[0])
        return saved_bytes(lambda: self._loss(patches.requires_grad_(), cells), self.model.parameters())


def update(images: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, low: Tensor, high: Tensor, inputs: StepInputs) -> Tensor:
    """Total variation, Adam and clip on whole images, in place, in functions that torch.compile fuses; returns the norms before the update."""
    beta1, beta2 = inputs.betas
    pads = ((0, 1), (1, 0)), ((0, 0, 0, 1), (0, 0, 1, 0)), ((0, 1, 0, 1), (1, 0, 1, 0)), ((0, 1, 1, 0), (1, 0, 0, 1))
    differences = [
        images[..., :-1] - images[..., 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., :-1, :-1] - images[..., 1:, 1:],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    ]
    norms = torch.stack([difference.square().sum().sqrt() for difference in differences])
    for difference, norm, (first, second) in zip(differences, norms, pads, strict=True):
        pull = torch.where(norm > 0, inputs.tv_weight * difference / norm, 0.0)
        grad = grad + F.pad(pull, first) - F.pad(pull, second)
    avg, avg_sq = beta1 * exp_avg + (1 - beta1) * grad, beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    size, scale = (inputs.lr / (1 - beta1**step)).to(images.dtype), (1 - beta2**step).sqrt().to(images.dtype)
    moved = images - size * avg / (avg_sq.sqrt() / scale + EPS)
    for target, value in ((images, moved.clamp(low.view(-1, 1, 1), high.view(-1, 1, 1))), (exp_avg, avg), (exp_avg_sq, avg_sq)):
        target.copy_(value)
    return norms


def make_step(
    model: nn.Module, batch: int, active: int, *, dtype: torch.dtype | None = None, variant: str | None = None, seed: int = 0
) -> CompiledStep:
    """The interface of `ours.make_step`; works on a copy of the model.

    dtype: None takes the one that GEMMs are faster in. variant: COMPILED or PLAIN; None takes the faster of the two, on CUDA the compiled one.
    """
    vit = describe(model)
    inputs = make_inputs(vit, batch, active, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=seed)
    dtype = choose_dtype(vit.device) if dtype is None else dtype
    if variant is None and vit.device.type == "cuda":
        variant = COMPILED
    if variant is not None:
        return CompiledStep(model, inputs, dtype, variant)
    candidates = [CompiledStep(model, inputs, dtype, variant) for variant in (COMPILED, PLAIN)]
    best = min(candidates, key=lambda step: seconds_of(step))
    return CompiledStep(model, inputs, dtype, best.variant)  # from its first iteration again
