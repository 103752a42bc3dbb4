"""What is computed is the user's model: where its own answers are others than its description's it is refused, whatever the reason, and named."""

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import smi
from smi.engine import forward_patches
from smi.errors import InputError
from smi.images.patches import to_patches
from smi.models.vit import describe
from tests.conftest import small_vit

pytestmark = pytest.mark.fast
GRID = torch.arange(16).expand(2, -1)


def answers(model, images):
    """The description's logits, proven."""
    vit = describe(model)
    return forward_patches(vit, to_patches(images, vit.patch_size), GRID)


def hooked(part="blocks.1.attn", change=lambda module, inputs, output: output * 0, **options):
    model = small_vit(depth=3, **options)
    model.get_submodule(part).register_forward_hook(change)
    return model


def before(part, change, **options):
    model = small_vit(depth=3, **options)
    model.get_submodule(part).register_forward_pre_hook(change)
    return model


def replaced(part, make, **options):
    model = small_vit(depth=3, **options)
    owner, _, name = part.rpartition(".")
    setattr(model.get_submodule(owner), name, make(model.get_submodule(part)))
    return model


def changed(change, **options):
    model = small_vit(depth=3, **options)
    change(model)
    return model


class Mixing(nn.Module):
    """Adds to every token what its neighbour is: another answer for a subset of the tokens alone, as a position within the block would give."""

    def __init__(self, mlp):
        super().__init__()
        self.act, self.fc1, self.fc2 = mlp.act, mlp.fc1, mlp.fc2

    def forward(self, x):
        y = self.fc2(self.act(self.fc1(x)))
        return y if x.shape[1] == 17 else y * 1.5  # dense as it should be


class Adapted(nn.Linear):
    """A linear layer with an adapter of rank 1 beside its weight."""

    def __init__(self, linear, size):
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        self.a, self.b = nn.Parameter(torch.randn(1, linear.in_features)), nn.Parameter(torch.full((linear.out_features, 1), size))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class Twice(VisionTransformer):
    def forward_features(self, x, **kwargs):
        return super().forward_features(x) * 2


def stale(model):
    """weight_norm of old makes its weight when it runs; here it is not the one that it would make."""
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.blocks[1].mlp.fc1)
    return model


REFUSED = {
    "a hook on attention": (lambda: hooked(), "block 1 .*Attention"),
    "a hook under a small layer scale": (lambda: hooked(init_values=1e-5), "block 1 .*Attention"),
    "a hook on a block": (lambda: hooked("blocks.2", lambda m, i, o: o + 0.1), "block 2 .*Block"),
    "a hook on a norm": (lambda: hooked("blocks.0.norm2", lambda m, i, o: o * 1.1), "block 0"),
    "a hook on a linear layer": (lambda: hooked("blocks.1.mlp.fc2", lambda m, i, o: o.roll(1, 1)), "block 1 .*Mlp"),
    "a hook before a layer": (lambda: before("blocks.2.attn.proj", lambda m, i: (i[0] * 1.01,)), "block 2 .*Attention"),
    "a hook on the model": (lambda: changed(lambda m: m.register_forward_hook(lambda m, i, o: o.flip(1))), "what is around them"),
    "a hook on the embedding": (lambda: hooked("patch_embed", lambda m, i, o: o * 1.1), "what is around them"),
    "a forward of the instance": (
        lambda: changed(lambda m: setattr(m.blocks[1].attn, "forward", lambda x, attn_mask=None, is_causal=False: x)),
        "block 1 .*Attention",
    ),
    "a subclass with another meaning": (lambda: small_vit(kind=Twice), "what is around them"),
    "an adapter": (lambda: replaced("blocks.1.attn.qkv", lambda linear: Adapted(linear, 0.3)), "block 1 .*Attention"),
    "another epsilon than the norm says": (lambda: replaced("blocks.0.norm1", lambda norm: Sharp(norm)), "block 0"),
    "another answer for fewer tokens": (lambda: replaced("blocks.2.mlp", Mixing), "block 2 .*Mixing"),
    "attention across the batch": (lambda: hooked("blocks.1", lambda m, i, o: o + 0.01 * o.mean(0, keepdim=True)), "block 1"),
    "noise of its own": (lambda: hooked("blocks.1", lambda m, i, o: o + 0.1 * torch.randn_like(o)), "block 1"),
    "no gradient": (lambda: changed(lambda m: setattr(m, "forward", torch.no_grad()(m.forward))), "no gradient in the pixels"),
    "a gradient of its own": (lambda: hooked("blocks.1", lambda m, i, o: o.detach() + (o - o.detach()) * 2), "gradient"),
    "an answer that is no logits": (lambda: changed(lambda m: m.register_forward_hook(lambda m, i, o: {"logits": o})), "must be logits"),
    "RMS normalisation": (lambda: small_vit(norm_layer="rmsnorm"), "block 0"),
    "a post-norm block": (lambda: small_vit(block_fn=timm.models.vision_transformer.ResPostBlock, init_values=None), "block 0"),
    "parallel attention and MLP": (lambda: small_vit(block_fn=timm.models.vision_transformer.ParallelThingsBlock), "block 0: .*pre-norm block"),
    "relative position": (lambda: replaced("blocks.1.attn", lambda attention: Biased(attention)), "block 1 .*Biased"),
    "a causal mask": (lambda: replaced("blocks.1.attn", lambda attention: Causal(attention)), "block 1 .*Causal"),
}


class Sharp(nn.LayerNorm):
    def __init__(self, norm):
        super().__init__(norm.normalized_shape, eps=norm.eps)
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, 0.1)


class Wrapped(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.num_heads, self.qkv, self.proj, self.inner = attention.num_heads, attention.qkv, attention.proj, attention


class Biased(Wrapped):
    def forward(self, x, attn_mask=None, is_causal=False):
        return self.inner(x, attn_mask=0.1 * torch.arange(x.shape[1]).expand(x.shape[1], -1))


class Causal(Wrapped):
    def forward(self, x, attn_mask=None, is_causal=False):
        return self.inner(x, is_causal=True)


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused_and_the_first_block_that_differs_is_named(name):
    make, reason = REFUSED[name]
    model = make()
    with pytest.raises(InputError, match=f"is not supported: .*{reason}"):
        smi.accelerate(model)


class Same(VisionTransformer):
    """Another class, which computes the same."""

    def forward_features(self, x, **kwargs):
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class SameBlock(Block):
    pass


class SameAttention(Attention):
    pass


ACCEPTED = {
    "a hook that looks": lambda: hooked(change=lambda module, inputs, output: None),
    "a subclass": lambda: small_vit(kind=Same),
    "another class of block": lambda: small_vit(block_fn=SameBlock),
    "another class of attention": lambda: small_vit(attn_layer=SameAttention),
    "an activation of one's own": lambda: replaced("blocks.1.mlp.act", lambda act: Gelu()),
    "an adapter that adds nothing": lambda: replaced("blocks.1.attn.qkv", lambda linear: Adapted(linear, 0.0)),
    "orthogonal weights": lambda: changed(lambda m: parametrizations.orthogonal(m.blocks[1].attn.proj)),
    "weight_norm": lambda: changed(lambda m: parametrizations.weight_norm(m.blocks[1].mlp.fc1)),
    "a parametrisation": lambda: changed(lambda m: parametrize.register_parametrization(m.blocks[0].mlp.fc2, "weight", Halved())),
    "weights that are made when it runs": lambda: changed(stale),
    "dropout": lambda: small_vit(proj_drop_rate=0.5, drop_path_rate=0.5, pos_drop_rate=0.3).train(),
    "attention without SDPA": lambda: changed(lambda m: [setattr(block.attn, "fused_attn", False) for block in m.blocks]),
    "blocks of different activations": lambda: replaced("blocks.1.mlp.act", lambda act: nn.GELU(approximate="tanh")),
    "gradient checkpointing": lambda: changed(lambda m: m.set_grad_checkpointing()),
    "frozen weights": lambda: small_vit().requires_grad_(False),
    "logits without spread": lambda: changed(lambda m: nn.init.zeros_(m.head.weight)),
}


class Gelu(nn.Module):
    def forward(self, x):
        return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_computes_the_same_is_accepted_whatever_it_is_called(name):
    model, images = ACCEPTED[name](), torch.randn(2, 3, 16, 16)
    found = answers(model, images)
    torch.testing.assert_close(found, copy.deepcopy(model).eval()(images) if name != "weights that are made when it runs" else model(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    assert describe(small_vit(depth=6).to(dtype)).embed.weight.dtype == dtype
    with pytest.raises(InputError, match="block 1 .*Attention"):
        describe(hooked().to(dtype))


def test_a_hook_that_comes_later_is_found_and_one_that_goes_is_forgotten(vit):
    describe(vit)
    handle = vit.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: -output)
    with pytest.raises(InputError, match="block 0 .*Mlp"):
        describe(vit)
    handle.remove()
    describe(vit)
    vit.blocks[1].attn.forward = lambda x, attn_mask=None, is_causal=False: x
    with pytest.raises(InputError, match="block 1 .*Attention"):
        describe(vit)


def test_a_known_model_is_asked_once():
    calls, model = [], small_vit()
    forward = VisionTransformer.forward
    try:
        VisionTransformer.forward = lambda self, x: calls.append(1) or forward(self, x)
        for _ in range(3):
            describe(model)
            smi.accelerate(model)
        with torch.no_grad():
            model.head.weight.mul_(2)  # other weights, the same model
        describe(model)
    finally:
        VisionTransformer.forward = forward
    assert len(calls) == 1


def test_an_adapter_is_not_left_out_of_training():
    """With weights of zero it changes no answer, and it has a gradient."""
    patches, index = torch.randn(2, 4, 3, 4, 4), torch.arange(4).expand(2, -1)
    model = replaced("blocks.1.attn.qkv", lambda linear: Adapted(linear, 0.0))
    with torch.no_grad():
        smi.forward_sparse(model, (patches, index))
    with pytest.raises(InputError, match="weights beside those"):
        smi.forward_sparse(model, (patches, index))


def test_parametrised_weights_are_trained():
    patches, index = torch.randn(2, 4, 3, 4, 4), torch.arange(4).expand(2, -1)
    model = changed(lambda m: parametrizations.weight_norm(m.blocks[1].mlp.fc1))
    smi.forward_sparse(model, (patches, index)).square().sum().backward()
    assert model.blocks[1].mlp.fc1.parametrizations.weight.original0.grad.abs().sum() > 0


def entry_points(model):
    images = smi.SparseImages(
        torch.randn(2, 4, 3, 4, 4),
        torch.arange(4).expand(2, -1),
        torch.tensor([0, 1]),
        torch.arange(2),
        torch.zeros(2).long(),
        (4, 4),
        (0.5,) * 3,
        (0.5,) * 3,
    )
    quick = {"num_images": 1, "iterations": 2, "progress": False, "method": "pri", "division": 2}
    yield lambda: smi.invert(model, **quick)
    yield lambda: next(smi.invert_batches(model, **{k: v for k, v in quick.items() if k != "progress"}))
    yield lambda: smi.accelerate(model)
    yield lambda: smi.drop_in(model)
    yield lambda: smi.forward_sparse(model, images)
    yield lambda: smi.quantize(model, images)
    yield lambda: smi.distill(model, small_vit(), images, steps=1, batch_size=2, progress=False)


@pytest.mark.filterwarnings("ignore::smi.images.readers.DenseFillWarning")
def test_every_entry_point_refuses():
    for call in entry_points(hooked()):
        with pytest.raises(InputError, match="block 1|made for another model"):
            call()
