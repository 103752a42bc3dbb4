"""The teacher that comes with the package: a small ViT that reads handwritten digits, trained by `train_digits`.

32x32 pixels, patch 4 (64 patches and CLS), one channel, ten classes. Trained with patch dropout, so that sparse images are in
its training distribution.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "digits.safetensors"
RECORD = FOLDER / "digits.json"
ARCHITECTURE: dict[str, Any] = {"img_size": 32, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 4, "num_heads": 3}


def untrained_digits(mean: float, std: float) -> nn.Module:
    """The digits architecture with untrained weights; mean and std of the training pixels as fractions of white."""
    from timm.models.vision_transformer import VisionTransformer

    model: Any = VisionTransformer(**ARCHITECTURE)
    model.pretrained_cfg = {"architecture": "digits", "mean": (mean,), "std": (std,), "flip": False}  # a mirrored digit is another sign
    return model


def digits() -> nn.Module:
    """The trained teacher in evaluation mode; its accuracy on real test digits is in `digits_record()`."""
    from safetensors.torch import load_file

    record = digits_record()
    model = untrained_digits(record["mean"], record["std"])
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def digits_record() -> dict[str, Any]:
    """How the teacher was trained and what it scores."""
    return json.loads(RECORD.read_text())
