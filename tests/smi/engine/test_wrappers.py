"""`smi.drop_in` and `smi.accelerate` against the plain timm model, in loops as other people write them."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

import smi
from smi.errors import InputError
from tests.conftest import PRUNED, small_vit

pytestmark = pytest.mark.fast


def plain(model, images, index):
    """timm's modules on the CLS token and the patches of index [B, 1 + n], and the last block's attention [B, H, T, T]."""
    x = model._pos_embed(model.patch_embed(images))
    x = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    for block in model.blocks:
        attn, y = block.attn, block.norm1(x)
        q, k, v = attn.qkv(y).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)
        x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x)), weights


class Research(torch.nn.Module):
    """The module whose call `drop_in` has."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, current_abs_index=None, next_relative_index=None):
        if next_relative_index.shape[1] != current_abs_index.shape[1]:
            current_abs_index = current_abs_index.gather(1, next_relative_index)
        logits, weights = plain(self.model, images, current_abs_index)
        return logits, [weights], current_abs_index


def research_loop(module, images, labels, iterations=9, prune_at=(2, 5), keep=0.7):
    """A sparse inversion as research code writes it: patches that the CLS token ignores leave."""
    images = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.1, betas=(0.5, 0.99))
    current = torch.arange(17).expand(len(images), -1)
    relative, history = current, []
    for t in range(iterations):
        optimizer.zero_grad()
        offset = (t % 3 - 1, 2 - t % 2)
        logits, attentions, current = module(images.roll(offset, (2, 3)), current, relative)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        relative = torch.arange(current.shape[1]).expand(len(images), -1)
        if t in prune_at:
            row = attentions[-1].mean(dim=1)[:, 0, 1:]
            best = row.topk(int(row.shape[1] * keep), dim=1).indices.sort(dim=1).values
            relative = torch.cat([torch.zeros(len(images), 1, dtype=torch.long), best + 1], dim=1)
        history.append(loss.item())
    return images.detach(), current, history


def test_a_research_loop_runs_unchanged():
    model, images, labels = small_vit(depth=3), torch.randn(2, 3, 16, 16), torch.tensor([1, 3])
    want_images, want_index, want_losses = research_loop(Research(model), images, labels)
    got_images, got_index, got_losses = research_loop(smi.drop_in(model, dtype="float32"), images, labels)
    assert torch.equal(got_index, want_index)
    assert got_index.shape == (2, 1 + 7)
    torch.testing.assert_close(torch.tensor(got_losses), torch.tensor(want_losses), rtol=1e-4, atol=1e-5)
    assert ((got_images - want_images).abs() < 1e-3).float().mean() > 0.99  # Adam's first steps have the sign of gradients that may be rounding


def test_logits_readout_and_gradient():
    model = small_vit(depth=3)
    images, index = torch.randn(3, 3, 16, 16), torch.tensor([[0, 3, 16, 1], [0, 5, 6, 7], [0, 9, 2, 11]])
    relative = torch.tensor([[0, 2], [0, 3], [0, 1]])
    for used, gathered in ((None, index), (relative, index.gather(1, relative))):
        one, two = images.clone().requires_grad_(), images.clone().requires_grad_()
        logits, attentions, given_back = smi.drop_in(model, dtype="float32")(one, index, used)
        want, weights = plain(model, two, gathered)
        assert torch.equal(given_back, gathered)
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)
        row = attentions[-1].mean(dim=1)[:, 0, 1:]
        torch.testing.assert_close(row, weights.mean(dim=1)[:, 0, 1:].detach(), rtol=1e-4, atol=1e-6)
        assert not row.requires_grad
        pull = torch.randn_like(logits)
        (found,), (grad,) = torch.autograd.grad(logits, one, pull), torch.autograd.grad(want, two, pull)
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-6)


def test_accelerate_is_the_model_itself(variant):
    channels, size = variant.patch_embed.proj.in_channels, variant.patch_embed.img_size
    images = torch.randn(2, channels, *size)
    one, two = images.clone().requires_grad_(), images.clone().requires_grad_()
    fast = smi.accelerate(variant, dtype="float32")
    got, want = fast(one), variant(two)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    pull = torch.randn_like(want)
    (found,), (grad,) = torch.autograd.grad(got, one, pull), torch.autograd.grad(want, two, pull)
    torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-5)
    assert fast.num_classes == variant.num_classes
    assert not any(parameter.requires_grad for parameter in fast.parameters())


def test_a_pruned_model_is_inverted_as_the_reference_inverts_it():
    model = small_vit(**PRUNED["pruned MLP"])
    made = [smi.invert(model, method="smi", num_images=3, iterations=6, engine=e, dtype="float32", progress=False) for e in ("fused", "reference")]
    torch.testing.assert_close(made[0].patches, made[1].patches, rtol=1e-3, atol=1e-3)


def test_two_passes_may_be_differentiated_in_any_order():
    fast, images = smi.accelerate(small_vit(), dtype="float32"), torch.randn(2, 3, 16, 16, requires_grad=True)
    first, second = fast(images), fast(images * 2)
    late = torch.autograd.grad(second.sum(), images)[0]
    early = torch.autograd.grad(first.sum(), images)[0]
    assert torch.equal(early, torch.autograd.grad(fast(images).sum(), images)[0])
    assert torch.equal(late, torch.autograd.grad(fast(images * 2).sum(), images)[0])


def test_a_pass_is_differentiated_once():
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    logits = smi.accelerate(small_vit())(images)
    torch.autograd.grad(logits.sum(), images, retain_graph=True)
    with pytest.raises(RuntimeError, match="call the model again"):
        torch.autograd.grad(logits.sum(), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 16, 12),), r"images must be \[B, 3, 16, 16\]"),
        ((torch.zeros(2, 3, 16, 16), torch.tensor([[1, 2], [0, 3]])), "begin with 0"),
        ((torch.zeros(2, 3, 16, 16), torch.tensor([[0, 17], [0, 3]])), "patches from 1 to 16"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(InputError, match=message):
        smi.drop_in(small_vit())(*arguments)


def test_weights_are_frozen_and_the_wrapper_can_be_copied():
    import copy

    model, images = small_vit(), torch.randn(2, 3, 16, 16)
    fast = smi.accelerate(model, dtype="float32")
    want = fast(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(fast(images), want)
    assert torch.equal(copy.deepcopy(fast)(images), want)
    assert fast(images[:0]).shape == (0, 5)


def test_inversion_under_no_grad():
    with torch.no_grad():
        made = smi.invert(small_vit(), method="dense", num_images=1, iterations=3, progress=False)
    assert len(made) == 1


WRAPPERS = {"accelerate": lambda model: smi.accelerate(model, dtype="float32"), "drop_in": lambda model: smi.drop_in(model, dtype="float32")}


def answer(module, images):
    found = module(images)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_modules_like_others(wrap):
    """Parameters, modes, copies, files of torch, states; the user's model is its own."""
    model, images = small_vit(), torch.randn(2, 3, 16, 16)
    fast = wrap(model.train())
    expected = answer(fast, images)
    assert model.training
    assert next(fast.parameters()).device == next(model.parameters()).device
    assert len(list(fast.parameters())) == len(list(model.parameters()))
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    other = wrap(small_vit(seed=1))
    assert not torch.equal(answer(other, images), expected)
    other.load_state_dict(fast.state_dict())
    for each in (fast.train(), fast.eval(), fast.float(), copy.deepcopy(fast), torch.load(file, weights_only=False), other):  # the test's own file
        assert torch.equal(answer(each, images), expected)
    with torch.no_grad():
        model.head.bias.add_(1)
        assert torch.equal(answer(fast, images), expected)
        fast.model.head.bias.add_(1)
        torch.testing.assert_close(answer(fast, images), expected + 1)
    with pytest.raises(InputError, match="the weights are frozen"):
        fast.requires_grad_()


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_under_torch_compile(wrap):
    fast, images = wrap(small_vit()), torch.randn(2, 3, 16, 16)
    one, two = images.clone().requires_grad_(), images.clone().requires_grad_()
    found, wanted = answer(torch.compile(fast, backend="eager"), one), answer(fast, two)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.autograd.grad(found.sum(), one)[0], torch.autograd.grad(wanted.sum(), two)[0])
