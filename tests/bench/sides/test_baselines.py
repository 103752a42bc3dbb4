"""The baselines compute what we compute: same losses, same pixels, same finished images."""

from dataclasses import replace

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled

import smi
from bench.sides import compiled, eager, ours
from bench.sides.saved_bytes import saved_bytes
from bench.sides.step_inputs import make_inputs
from smi.inversion import augmentation
from smi.inversion.schedules import make_schedule
from smi.models.vit import describe
from tests.conftest import small_vit

STEPS = 6
BATCH = 3
VARIANTS = {
    "plain": {},
    "not square": {"img_size": (12, 20)},
    "registers without position": {"reg_tokens": 4, "no_embed_class": True},
    "distilled": {"kind": VisionTransformerDistilled},
    "query-key norm, layer scale": {"qk_norm": True, "init_values": 0.1},
    "average pool": {"global_pool": "avg"},
}


def check_steps(mine, theirs, loss_tolerance, pixel_tolerance):
    for _ in range(STEPS):
        torch.testing.assert_close(theirs(), mine().to(theirs.images.dtype), rtol=loss_tolerance, atol=0)
        torch.testing.assert_close(theirs.images.detach(), mine.images, rtol=0, atol=pixel_tolerance)


@pytest.mark.parametrize("active", [None, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_agree_in_float64(variant, active):
    """Dense and sparse, augmented, every pixel updated as published."""
    model = small_vit(**VARIANTS[variant]).double()
    active = describe(model).num_patches if active is None else active
    mine = {side: ours.make_step(model, BATCH, active, engine="reference", dtype="float64", update="all") for side in ("eager", "compiled")}
    check_steps(mine["eager"], eager.make_step(model, BATCH, active, dtype=torch.float64), 1e-6, 1e-8)
    check_steps(mine["compiled"], compiled.make_step(model, BATCH, active, dtype=torch.float64, variant=compiled.PLAIN), 1e-9, 1e-9)


@pytest.mark.parametrize("active", [16, 5])
def test_steps_agree_in_float32(active):
    model = small_vit()
    research = eager.make_step(model, BATCH, active)
    plain = compiled.make_step(model, BATCH, active, dtype=torch.float32, variant=compiled.PLAIN)
    check_steps(ours.make_step(model, BATCH, active, engine="reference", update="all"), research, 1e-4, 2e-3)
    check_steps(ours.make_step(model, BATCH, active, engine="reference", update="all"), plain, 1e-4, 2e-3)


def test_active_pixels_alone_move_the_same_at_first():
    """Our default leaves the other pixels alone; where patches are active the first update is the published one."""
    model = small_vit().double()
    mine = ours.make_step(model, BATCH, 5, engine="reference", dtype="float64")
    theirs = eager.make_step(model, BATCH, 5, dtype=torch.float64)
    before = mine.images.clone()
    mine(), theirs()
    moved = mine.images != before
    assert 0 < moved.sum() < moved.numel()
    torch.testing.assert_close(mine.images[moved], theirs.images.detach()[moved], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_compiled_agrees():
    model = small_vit()
    theirs = compiled.make_step(model, BATCH, 5, dtype=torch.float32, variant=compiled.COMPILED)
    assert theirs.resolved == f"{compiled.COMPILED} {theirs.dtype}"
    check_steps(ours.make_step(model, BATCH, 5, engine="reference", update="all"), theirs, 1e-4, 2e-3)


def test_compiled_takes_the_faster_variant_and_starts_at_the_beginning(monkeypatch):
    monkeypatch.setattr(compiled, "seconds_of", lambda step, calls=2: {compiled.PLAIN: 1.0, compiled.COMPILED: 2.0}[step.variant])
    step = compiled.make_step(small_vit(), BATCH, 5, dtype=torch.float32)
    assert step.variant == compiled.PLAIN
    torch.testing.assert_close(step(), ours.make_step(small_vit(), BATCH, 5, engine="reference")(), rtol=1e-5, atol=0)


def test_eager_does_what_research_code_does():
    """Weight gradients, a matrix for every layer, and all pixels."""
    step = eager.make_step(small_vit(), BATCH, 5)
    step()
    assert all(parameter.grad is not None for parameter in step.model.parameters())
    assert [tuple(attention.shape) for attention in step.attentions] == [(BATCH, 3, 6, 6)] * 2
    assert not any(parameter.requires_grad for parameter in compiled.make_step(small_vit(), 1, 5, variant=compiled.PLAIN).model.parameters())


@pytest.mark.parametrize(("method", "options"), [("dense", {}), ("smi", {}), ("pri", {"division": 3})])
def test_whole_runs_finish_the_same_images(method, options):
    """Where augmentation moves whole patches and there is no total variation, pixels that left cannot matter: then the sparse runs agree too."""
    model, iterations = small_vit().double(), 30
    vit = describe(model)
    schedule = make_schedule(method, vit.num_patches, iterations, **options)
    sparse = method != "dense"
    table = augmentation.draw(iterations, vit.image_size, torch.Generator().manual_seed(1), jitter=5)
    if sparse:
        table[:, :2] = table[:, :2] // vit.patch_size * vit.patch_size
    tv_weight = 0.0 if sparse else 1e-4
    inputs = replace(make_inputs(vit, BATCH, vit.num_patches, dtype=torch.float64), tv_weight=tv_weight)
    stages = []
    finished = eager.invert(model, schedule, inputs, table, stages.append)
    assert stages == [stage.active for stage in schedule.stages()]
    images = smi.invert(
        model,
        method=method,
        num_images=BATCH * schedule.images_per_trajectory,
        iterations=iterations,
        init=inputs.images,
        labels=inputs.labels,
        augmentation=table.tolist(),
        tv_weight=tv_weight,
        dtype="float64",
        progress=False,
        **options,
    )
    patches = torch.stack([patches for patches, _ in finished], 1).flatten(0, 1)
    index = torch.stack([index for _, index in finished], 1).flatten(0, 1)
    assert torch.equal(index, images.index)
    torch.testing.assert_close(patches, images.patches, rtol=0, atol=1e-6)


def test_kept_bytes_are_distinct_storages_without_the_weights():
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    leaf = x.requires_grad_()

    def forward():
        y = leaf @ weight  # keeps the weight
        return (y.exp() * y).sum()  # exp keeps its result, the product both: two tensors of 4 x 8

    assert saved_bytes(forward, [weight]) == 2 * 4 * 8 * 4
    assert saved_bytes(forward, []) == 2 * 4 * 8 * 4 + 8 * 8 * 4


def test_eager_keeps_more_than_the_frozen_model_with_sdpa():
    kept = {active: eager.make_step(small_vit(), BATCH, active).kept_bytes() for active in (16, 5)}
    assert kept[16] > kept[5]
    assert compiled.make_step(small_vit(), BATCH, 16, variant=compiled.PLAIN).kept_bytes() < kept[16] / 2
