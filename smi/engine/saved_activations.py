"""What a forward pass of the fused engine leaves for its backward pass, the memory it lies in, and how many bytes that takes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.layers.recorded_pass import RecordedPass
from ..models.description import ViT


@dataclass(frozen=True)
class Mode:
    """How the fused engine computes: what decides its memory."""

    dtype: torch.dtype
    recompute: bool = False  # compute the activation's derivative again in the backward pass instead of saving it


class Workspace:
    """Where the results of a pass go: each layer allocates its own."""

    def __init__(self) -> None:
        self.recorded: dict[object, RecordedLayers] = {}  # passes whose results lie here

    def __call__(self, name: str, *shape: int) -> Tensor | None:
        """Memory for the result of that name; None where the layer allocates it."""
        return None


class StaticWorkspace(Workspace):
    """Memory that stays from iteration to iteration, one tensor of dtype for each name."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self.tensors or self.tensors[name].shape != shape:
            self.tensors[name] = torch.empty(shape, dtype=self.dtype, device="cpu")
        return self.tensors[name]


class RecordedLayers(NamedTuple):
    """Layers recorded for the input x: running the recording fills the result."""

    x: Tensor
    result: Any
    recording: RecordedPass


class HeadNorm(NamedTuple):
    """A norm of queries or keys that was applied to one part of packed qkv."""

    part: int  # along the axis of q, k and v
    norm: Any  # the layer
    x: Tensor
    mean: Tensor
    rstd: Tensor  # 1 / standard deviation


class SavedBlock(NamedTuple):
    """Of one block: 3d + 4d + 2d elements per token, and a few numbers per row."""

    x: Tensor  # [B, T, d], the block's input
    norm1: list[Tensor]  # mean and 1 / standard deviation of each row
    qkv: Tensor  # [B, T, 3, H, D], as attention read it
    head_norms: list[HeadNorm]
    attended: Tensor | None  # [B, T, H * D], attention's output, for a version whose backward reads it
    lse: Tensor  # [B, H, T], log of the sum of exponentials
    mid: Tensor  # [B, T, d], between attention and MLP
    norm2: list[Tensor]
    activation: Tensor | None  # [B, T, 4d], the activation's derivative; None: computed again


class SavedLastBlock(NamedTuple):
    """Of the last block, where queries, projection and MLP are computed for the R tokens that the heads read."""

    x: Tensor  # [B, T, d]
    norm1: list[Tensor]
    q: Tensor  # [B, R, H, D], as attention read it
    kv: Tensor  # [B, T, 2, H, D], likewise
    q_norms: list[HeadNorm]
    k_norms: list[HeadNorm]
    weights: Tensor  # [B, H, R, T], of attention
    mid: Tensor  # [B, R, d]
    norm2: list[Tensor]
    activation: Tensor  # [B, R, 4d]


@dataclass
class TrunkPass:
    """What a pass through all blocks gives and leaves."""

    norm_pre: tuple[Tensor, ...] | None = None  # x, mean, 1 / standard deviation
    blocks: list[SavedBlock] = field(default_factory=list)
    last_block: SavedLastBlock | None = None
    output: Tensor = field(init=False)  # [B, R or T, d], the tokens that the tail reads
    weights: Tensor = field(init=False)  # [B, H, R or 1, T], of the last block's attention
    recorded: dict[object, RecordedLayers] = field(default_factory=dict)  # the backward pass, once recorded


@dataclass
class SavedPass:
    """What one forward pass leaves for its backward pass."""

    images: Tensor  # for shape and dtype alone
    index: Tensor
    augmentation: Tensor | None
    workspace: Workspace
    trunk: TrunkPass
    tail_input: Tensor  # the trunk's output as a leaf of autograd
    logits: Any  # Tensor [B, classes] with the tail's graph, None once that is differentiated

    def bytes(self) -> int:
        """Bytes of the trunk's saved activations; images and index are not counted."""
        saved = _tensors([self.trunk.blocks, self.trunk.norm_pre, self.trunk.last_block])
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in saved}.values())


def _tensors(saved: object) -> Iterator[Tensor]:
    """Those within lists and tuples of lists and tuples."""
    if isinstance(saved, Tensor):
        yield saved
    elif isinstance(saved, list | tuple):
        for part in saved:
            yield from _tensors(part)


def pass_bytes(vit: ViT, batch: int, active: int, mode: Mode) -> int:
    """Bytes of a forward and backward pass on `batch` images with `active` patches: saved activations, and results that live for a layer or two."""
    d, tokens = vit.embed_dim, vit.num_prefix + active
    saved = sum(3 * block.width + (0 if mode.recompute else block.hidden) + 2 * d for block in vit.blocks)
    saved += sum(block.width for block in vit.blocks)  # attention's output, which only some versions read again
    passing = 2 * max(block.hidden for block in vit.blocks) + 6 * max(block.width for block in vit.blocks) + 6 * d
    pixels = 2 * active * vit.embed.weight.shape[1]
    return batch * (tokens * (saved + passing) + pixels) * mode.dtype.itemsize
