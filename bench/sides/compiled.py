"""What people would use instead: `eager`, a step as research code writes it, and `compiled`, the best that stock PyTorch gives.

Both compute the published step (augmented forward on the active patches, cross-entropy and total variation, pixel gradient, Adam, clip) from the same
start as ours; tests/bench/test_baselines.py shows that losses and pixels agree. They differ in how:

| | eager | compiled |
| --- | --- | --- |
| weights | float32, requiring grad: backward computes their gradients | frozen, bfloat16 where products are faster in it |
| patch embedding | convolution of the whole rolled and flipped image, then a gather of tokens | a gather of the active patches' pixels, one product |
| attention | q k^T, softmax, v, each matrix kept in a list | scaled_dot_product_attention, nothing kept |
| total variation, Adam, clip | autograd and torch.optim.Adam on whole images | one compiled function of whole images |
| host | `.item()` at every step | nothing: on CUDA one captured graph, the augmentation read from a device table |
"""

import copy
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi.images.patches import to_patches
from smi.inversion import importance
from smi.inversion.schedules import Schedule
from smi.kernels.patch_embed.reference import moved_cells, source_pixels
from smi.models.vit import describe

from . import plain_operations
from .step_inputs import Start, make_start, restored

PROBE = 256  # side of the product that decides between float32 and bfloat16
GAIN = 1.1  # by which bfloat16 must be faster to be taken
EPS = 1e-8  # of Adam
COMPILED, PLAIN = "torch.compile", "not compiled"


class EagerStep:
    """Research code, its waste included: weight gradients, every attention matrix, whole images, `.item()`."""

    def __init__(self, model: nn.Module, start: Start, own: bool = True):
        """own: work on a copy of the model; False converts the caller's."""
        self.model = (copy.deepcopy(model) if own else model).to(start.images.device, start.images.dtype).eval().requires_grad_()
        self.grid, self.patch_size = self.model.patch_embed.grid_size, self.model.patch_embed.patch_size[0]
        self.images = start.images.clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.images], lr=start.lr, betas=start.betas)
        self.index, self.labels, self.tv_weight = start.index, start.labels, start.tv_weight
        self.low, self.high = start.low.view(-1, 1, 1), start.high.view(-1, 1, 1)
        self.rows, self.t = start.table.tolist(), 0
        self.dtype = str(start.images.dtype).removeprefix("torch.")
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
        """What the CLS token paid to each active patch in the last block of the last step, mean over heads: [B, n]."""
        return self.attentions[-1].detach().mean(1)[:, 0, self.model.num_prefix_tokens :]

    def kept_bytes(self) -> int:
        from ..measuring.memory import saved_bytes

        return saved_bytes(lambda: self.loss(*self.rows[0]), [self.images, *self.model.parameters()])


def attend(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """timm's Attention written out: its output, and the matrix [B, H, T, T]."""
    batch, tokens, _ = x.shape
    q, k, v = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    attention = (attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)).softmax(-1)
    return attn.proj((attention @ v).transpose(1, 2).reshape(batch, tokens, -1)), attention


def eager_step(model: nn.Module, batch: int, active: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, own: bool = True) -> EagerStep:
    """The interface of `ours.make_step`. own: work on a copy of the model."""
    return EagerStep(model, make_start(model, batch, active, dtype=dtype, seed=seed), own)


def eager_run(
    model: nn.Module, schedule: Schedule, start: Start, table: Tensor, on_stage: Callable[[int], None] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """A whole run over a schedule: (patches [B, n, C, p, p], index [B, n]) of every finished image, by stage.

    Patches are ranked by the last block's attention in the iteration before an event, which is not augmented. table: int [iterations, 3].
    on_stage: called with the active patches before every stage.
    """
    step = EagerStep(model, start)
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
    patches = to_patches(step.images.detach(), step.patch_size)
    return patches[torch.arange(len(index), device=index.device)[:, None], index], index


class CompiledStep:
    """Stock PyTorch at its best: timm's blocks with SDPA, frozen, compiled, and on CUDA the whole step in one graph."""

    def __init__(self, model: nn.Module, start: Start, dtype: torch.dtype, variant: str, own: bool = True):
        """own: work on a copy of the model; False converts the caller's."""
        device = start.images.device
        self.model = (copy.deepcopy(model) if own else model).to(device, dtype).eval().requires_grad_(False)
        self.vit, self.start = describe(self.model), start
        self.images = start.images.clone()
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
        self.replay = restored(self.run, (self.images, *self.moments, self.row, self.step), device)

    def __call__(self) -> Tensor:
        self.replay()
        return self.value

    def run(self) -> None:
        start = self.start
        augmentation = start.table.index_select(0, self.row)[0]
        patches, source, cells = self.gather(augmentation)
        loss = self._loss(patches.requires_grad_(), cells)
        (grad,) = torch.autograd.grad(loss, patches)
        self.step += 1
        self.row.add_(1).remainder_(len(start.table))
        norms = self._update(self.images, self.spread(grad, source), *self.moments, self.step, start.low, start.high, start)
        self.value = loss.detach() + start.tv_weight * norms.sum()

    def gather(self, augmentation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [B, n, C * p * p] under the cells [B, n] to which the active patches moved, and where in the still image they lie."""
        vit, images = self.vit, self.images
        cells = moved_cells(self.start.index, vit.grid, vit.patch_size, augmentation)
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
        return F.cross_entropy(logits.to(patches.dtype), self.start.labels)

    def kept_bytes(self) -> int:
        from ..measuring.memory import saved_bytes

        patches, _, cells = self.gather(self.start.table[0])
        return saved_bytes(lambda: self._loss(patches.requires_grad_(), cells), self.model.parameters())


def update(images: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, low: Tensor, high: Tensor, start: Start) -> Tensor:
    """Total variation, Adam and clip on whole images, in place, in functions that torch.compile fuses; the norms, as they were before."""
    beta1, beta2 = start.betas
    pads = ((0, 1), (1, 0)), ((0, 0, 0, 1), (0, 0, 1, 0)), ((0, 1, 0, 1), (1, 0, 1, 0)), ((0, 1, 1, 0), (1, 0, 0, 1))
    differences = [
        images[..., :-1] - images[..., 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., :-1, :-1] - images[..., 1:, 1:],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    ]
    norms = torch.stack([difference.square().sum().sqrt() for difference in differences])
    for difference, norm, (first, second) in zip(differences, norms, pads, strict=True):
        pull = torch.where(norm > 0, start.tv_weight * difference / norm, 0.0)
        grad = grad + F.pad(pull, first) - F.pad(pull, second)
    avg, avg_sq = beta1 * exp_avg + (1 - beta1) * grad, beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    size, scale = (start.lr / (1 - beta1**step)).to(images.dtype), (1 - beta2**step).sqrt().to(images.dtype)
    moved = images - size * avg / (avg_sq.sqrt() / scale + EPS)
    for target, value in ((images, moved.clamp(low.view(-1, 1, 1), high.view(-1, 1, 1))), (exp_avg, avg), (exp_avg_sq, avg_sq)):
        target.copy_(value)
    return norms


def compiled_step(
    model: nn.Module, batch: int, active: int, *, dtype: torch.dtype | None = None, variant: str | None = None, seed: int = 0
) -> CompiledStep:
    """The interface of `ours.make_step`. dtype: None takes what products are faster in. variant: COMPILED or PLAIN, None the faster of the two, which
    on CUDA is always the compiled one."""
    vit = describe(model)
    start = make_start(vit, batch, active, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=seed)
    dtype = fast_dtype(vit.device) if dtype is None else dtype
    if variant is None and vit.device.type == "cuda":
        variant = COMPILED
    if variant is not None:
        return CompiledStep(model, start, dtype, variant)
    candidates = [CompiledStep(model, start, dtype, variant) for variant in (COMPILED, PLAIN)]
    best = min(candidates, key=lambda step: seconds_of(step))
    return CompiledStep(model, start, dtype, best.variant)  # from the start again


def seconds_of(run: Callable[[], object], calls: int = 2) -> float:
    """The smallest of a few calls on the CPU, after one that compiles and warms up."""
    run()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


@cache
def product_seconds(device: torch.device) -> dict[torch.dtype, float]:
    """Seconds of one product of two matrices of side PROBE on the CPU in float32 and bfloat16, measured once."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, PROBE, PROBE).to(device, dtype).unbind()
        seconds[dtype] = seconds_of(lambda a=a, b=b: a @ b, 3)
    return seconds


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where products are faster in it, which on every GPU that this package names they are, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    seconds = product_seconds(device)
    return torch.bfloat16 if seconds[torch.float32] > GAIN * seconds[torch.bfloat16] else torch.float32
