"""The teacher, and real images as it takes them; loaded once in a process."""

from functools import cache
from pathlib import Path

from torch import Tensor, nn

from smi.datasets import load
from smi.models.by_name import load_model

from .config import Config


@cache
def teacher_of(name: str) -> nn.Module:
    """A model by its name or folder; a .safetensors file holds weights of the architecture that it is named after."""
    return load_model(Path(name).stem, checkpoint=name) if name.endswith(".safetensors") else load_model(name)


@cache
def real_data(config: Config, split: str) -> tuple[Tensor, Tensor]:
    """Normalised images [M, C, H, W] and labels int64 [M] of a split; of "test" as many as accuracy is measured on."""
    limit = config.test_images if split == "test" else None
    return load(config.data, teacher_of(config.teacher), split, limit)
