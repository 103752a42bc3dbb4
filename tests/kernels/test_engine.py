"""A whole pass of the fused engine by the kernels of a GPU, in the interpreter where there is none."""

import pytest
import torch

from smi.engine import Fused
from smi.kernels.comparison import relative_error
from smi.models.vit import describe
from tests.conftest import small_vit

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("recompute", [False, True])
def test_triton_carries_a_whole_pass(recompute, monkeypatch, device):
    """Forward and backward, the last block for one token included, as by the CPU's own layers."""
    vit = describe(small_vit(depth=2).eval())
    images, pull = torch.randn(2, vit.channels, *vit.image_size), torch.randn(2, vit.num_classes)
    index = torch.rand(2, vit.num_patches).argsort(1)[:, :3]
    augmentation = torch.tensor([3, -5, 1], dtype=torch.int32)

    def run(on):
        fused = Fused(vit.to(on, torch.float32), "float32", recompute)
        output, _, saved = fused.forward(images.to(on), index.to(on), augmentation.to(on))
        grad = fused.backward(saved, pull.to(on))
        return fused, *(x.cpu() for x in (output.logits, output.attention, grad))

    _, *want = run("cpu")
    monkeypatch.setenv("SMI_BACKEND", "triton")
    fused, *found = run(device)
    assert set(fused.describe()["versions"].values()) == {"triton"}
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, want, strict=True))
