"""What a measured step works on: pixels, labels, active patches and augmentations from a seed, the same for every side."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smi.inversion import augmentation
from smi.inversion.losses import TV_WEIGHT
from smi.inversion.settings import Preset
from smi.models.vit import ViT, describe

AUGMENTATIONS = 64  # rows of the table; a longer run starts it again


@dataclass(frozen=True, eq=False)
class StepInputs:
    """B images of which n patches each are active, and the constants of the published optimiser."""

    images: Tensor  # [B, C, H, W], noise
    labels: Tensor  # int64 [B]
    index: Tensor  # int64 [B, n], cells of the active patches, ascending
    table: Tensor  # int32 [AUGMENTATIONS, 3], (dy, dx, flip)
    low: Tensor  # [C], of valid pixels
    high: Tensor
    tv_weight: float = TV_WEIGHT
    lr: float = Preset.lr
    betas: tuple[float, float] = Preset.betas


def make_inputs(model: nn.Module | ViT, batch: int, active: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> StepInputs:
    """`active` patches of each of `batch` images, on the model's device; the pixels in `dtype`."""
    vit = model if isinstance(model, ViT) else describe(model)
    device = vit.device
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, vit.channels, *vit.image_size, generator=generator, dtype=torch.float64)
    labels = torch.randint(vit.num_classes, (batch,), generator=generator)
    index = torch.rand(batch, vit.num_patches, generator=generator).argsort(1)[:, :active].sort(1).values
    table = augmentation.draw(AUGMENTATIONS, vit.image_size, generator)
    low, high = (bound.to(device, dtype) for bound in vit.valid_range())
    return StepInputs(images.to(device, dtype), labels.to(device), index.to(device), table.to(device), low, high)
