"""What enters the C++ is checked: shapes, dtypes, contiguity, range and memory. A call that does not fit raises, and reads and writes nothing."""

import pytest
import torch

from smi.csrc import host
from smi.kernels.attention import attention
from smi.kernels.attention import cpu as attention_cpu
from smi.kernels.cls_attention import cpu as cls_attention
from smi.kernels.image_step import cpu as image_step
from smi.kernels.layer_norm import cpu as layer_norm
from smi.kernels.layers.cpp import Embed, Linear, PackedMatrix
from smi.kernels.layers.recorded_pass import record
from smi.kernels.patch_embed import cpu as patch_embed

pytestmark = [pytest.mark.fast, pytest.mark.skipif(host.compiler() is None, reason="no C++ compiler")]


def gone(*shape):
    """A tensor whose storage was taken from under it."""
    x = torch.ones(shape)
    x.untyped_storage().resize_(0)
    return x


def step(**other):
    images = torch.zeros(2, 3, 8, 8)
    given = {"images": images, "grad": images, "exp_avg": images.clone(), "exp_avg_sq": images.clone(), "step": torch.tensor(1)}
    given |= {"low": torch.zeros(3), "high": torch.ones(3), "index": torch.tensor([[0], [3]]), "patch_size": 4, "norms": torch.ones(4)}
    return image_step.forward(*(given | {"tv_weight": 1.0, "lr": 0.1, "beta1": 0.5, "beta2": 0.9, "eps": 1e-8, "out": None} | other).values())


x, cells, qkv = torch.ones(2, 5, 8), torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 5, 3, 2, 4)
CALLS = {
    "another width": lambda: Linear(torch.ones(6, 7)).forward(x),
    "another dtype": lambda: Linear(torch.ones(6, 8)).forward(x.double()),
    "weights of another dtype": lambda: Linear(torch.ones(6, 8).double()),
    "rows apart": lambda: Linear(torch.ones(6, 8)).forward(torch.ones(2, 5, 16)[..., ::2]),
    "too small for the result": lambda: Linear(torch.ones(6, 8)).forward(x, torch.empty(2, 5, 5)),
    "too small for what is saved": lambda: Linear(torch.ones(6, 8)).forward_activation(x, "gelu", True, torch.empty(2, 5, 5)),
    "another residual": lambda: Linear(torch.ones(6, 8)).forward_residual(x, torch.ones(2, 5, 5)),
    "another bias": lambda: Linear(torch.ones(6, 8), torch.ones(5)).forward(x),
    "another layer scale": lambda: Linear(torch.ones(6, 8), None, torch.ones(7)),
    "another derivative": lambda: Linear(torch.ones(8, 6)).backward_activation(x, torch.ones(2, 5, 5), "gelu"),
    "memory that is gone": lambda: Linear(torch.ones(6, 8)).forward(gone(2, 5, 8)),
    "weights that are gone": lambda: PackedMatrix(gone(6, 8)),
    "meta tensors": lambda: Linear(torch.ones(6, 8)).forward(x.to("meta")),
    "norm of another width": lambda: layer_norm.forward(x, torch.ones(7), None, 1e-6, None),
    "norm with another residual": lambda: layer_norm.forward(x, torch.ones(8), None, 1e-6, torch.ones(2, 5, 7)),
    "norm of another dtype": lambda: layer_norm.backward(x.half(), None, x, torch.ones(8), torch.ones(2, 5), torch.ones(2, 5), 1e-6),
    "statistics of other rows": lambda: layer_norm.backward(x, None, x, torch.ones(8), torch.ones(2, 4), torch.ones(2, 5), 1e-6),
    "another gradient of attention": lambda: attention_cpu.backward(torch.ones(2, 5, 7), qkv, None, None, None, torch.ones(2, 2, 5), 1.0),
    "another lse": lambda: attention_cpu.backward(torch.ones(2, 5, 8), qkv, None, None, None, torch.ones(2, 1, 5), 1.0),
    "more rows than tokens": lambda: attention_cpu.backward(torch.ones(2, 6, 8), qkv, None, None, None, torch.ones(2, 2, 6), 1.0),
    "a result of attention that is too small": lambda: attention_cpu.forward(qkv, None, None, 1.0, torch.empty(2, 4, 8)),
    "other weights of attention": lambda: cls_attention.backward(
        torch.ones(2, 1, 8), None, torch.ones(2, 1, 2, 4), qkv[:, :, 1:], torch.ones(2, 2, 1, 4), 1.0
    ),
    "other keys": lambda: cls_attention.forward(torch.ones(2, 1, 2, 4), torch.ones(1, 5, 2, 2, 4), 1.0),
    "more tokens than there are": lambda: cls_attention.take_tokens(x, 6),
    "other tokens": lambda: cls_attention.add_tokens(x, torch.ones(2, 2, 7)),
    "other moments": lambda: step(exp_avg=torch.zeros(2, 3, 8, 7)),
    "moments of another dtype": lambda: step(exp_avg_sq=torch.zeros(2, 3, 8, 8).double()),
    "patches that do not divide": lambda: step(patch_size=3),
    "indices of more images": lambda: step(index=torch.zeros(3, 1, dtype=torch.long)),
    "other bounds": lambda: step(low=torch.zeros(2)),
    "other norms": lambda: step(norms=torch.ones(3)),
    "images of fewer": lambda: patch_embed.take_pixels(torch.zeros(1, 3, 8, 8), cells, None, 4, torch.float32),
    "pixels of other patches": lambda: patch_embed.give_pixels(torch.zeros(2, 2, 47), cells, None, 4, torch.empty(2, 3, 8, 8)),
    "another position": lambda: Embed(torch.ones(8, 48), None, torch.ones(4, 7), torch.ones(1, 8), 4).forward(torch.zeros(2, 3, 8, 8), cells, None),
    "what autograd kept of another call": lambda: torch.ops.smi.attention_eager_backward(torch.ones(2, 5, 8), qkv, None, None, 1.0, torch.ones(3)),
    "a gradient of another call": lambda: torch.ops.smi.attention_eager_backward(torch.ones(2, 5, 9), qkv, None, None, 1.0, torch.ones(2, 2, 5)),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_does_not_fit_is_refused(name):
    host.operation("attention_eager")
    with pytest.raises(ValueError, match=r"C\+\+ takes|it takes|is gone|do not|among the first|must|of 5 tokens"):
        CALLS[name]()


@pytest.mark.parametrize("wrong", [[[0, 5]], [[-1, 0]]])
@pytest.mark.parametrize("grad", [False, True])
def test_indices_beyond_the_memory_are_refused(wrong, grad):
    wrong, packed = torch.tensor(wrong), torch.ones(1, 5, 3, 2, 4, requires_grad=grad)
    with pytest.raises(IndexError, match="must lie from 0 to 4"):
        attention(packed, wrong)
    with pytest.raises(IndexError, match="lengths must lie from 0 to 5"):
        attention(packed, None, torch.tensor([6]))
    with pytest.raises(IndexError, match="must lie from 0 to 3"):
        patch_embed.take_pixels(torch.zeros(1, 3, 8, 8), wrong, None, 4, torch.float32)
    with pytest.raises(IndexError, match="must lie from 0 to 3"):
        step(index=wrong.expand(2, -1))


def test_a_recording_knows_when_its_memory_has_moved():
    linear, x = Linear(torch.eye(8)), torch.randn(2, 5, 8)
    result, recorded = record(lambda: linear.forward(x), 2, 5)
    assert recorded.fits()
    kept = x.untyped_storage()
    x.set_(torch.randn(2, 5, 8))
    assert not recorded.fits()
    x.set_(kept, 0, (2, 5, 8))
    assert recorded.fits()
    recorded.run()
    assert torch.equal(result, x)
