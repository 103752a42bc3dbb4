"""Terms of the inversion loss: plain functions of (images [B, C, H, W], logits [B, classes], labels int64 [B]) that return a scalar.

The default is cross-entropy plus total variation (docs/methods.md). A user's own term needs no more than this signature; one with the attribute
`needs = "attention_outputs"` gets those of every block, a list of [B, n, heads, width], as its fourth argument (see psaq.patch_similarity).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..kernels.image_step import tv_norms

Loss = Callable[..., Tensor]
TV_WEIGHT = 1e-4


def cross_entropy(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(logits)[label]."""
    return F.cross_entropy(logits, labels)


def total_variation(weight: float = TV_WEIGHT) -> Loss:
    """weight times the sum of the four L2 norms, each over the whole batch, of the differences along width, height and both diagonals."""

    def loss(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return weight * tv_norms(images).sum()

    loss.tv_weight = weight  # type: ignore[attr-defined]  # by which the fused engine knows it
    return loss


def default_losses(tv_weight: float = TV_WEIGHT) -> list[Loss]:
    """The published loss; append to it or replace it."""
    return [cross_entropy, total_variation(tv_weight)]


def needs_attention_outputs(loss: Loss) -> bool:
    """Whether a term asks for the blocks' attention outputs."""
    return getattr(loss, "needs", None) == "attention_outputs"


def total(losses: Sequence[Loss], images: Tensor, logits: Tensor, labels: Tensor, attention_outputs: list[Tensor] | None) -> Any:
    """The sum of all terms: a scalar Tensor unless a user's term returns something else."""
    return sum(term(images, logits, labels, attention_outputs) if needs_attention_outputs(term) else term(images, logits, labels) for term in losses)
