"""Images and settings that the tests of knowledge transfer share."""

import torch

from smi.images.sparse_images import SparseImages

QUICK = {"steps": 12, "batch_size": 8, "eval_every": 4, "progress": False, "preset": "adamw"}


def timeless(curve):
    """A learning curve without the seconds, which are another's every time."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in curve]


def make_images(count=40, kept=6, grid=(4, 4), patch=4, channels=3, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(count, grid[0] * grid[1], generator=g).argsort(1)[:, :kept].sort(1).values
    return SparseImages(
        torch.randn(count, kept, channels, patch, patch, generator=g),
        index,
        torch.randint(classes, (count,), generator=g),
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64),
        grid,
        mean=(0.5, 0.4, 0.3)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
    )
