"""What a run promises: which images, which patches, from which random numbers."""

import math
import subprocess
import sys

import pytest
import torch

import smi
from smi import engine
from smi.errors import InputError, RunError
from smi.inversion.losses import default_losses
from smi.inversion.schedules import Event, Schedule
from smi.models.vit import describe
from tests.conftest import small_vit

pytestmark = pytest.mark.fast

QUICK = {"iterations": 12, "progress": False}


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("patches", "index", "labels", "trajectory", "stage"))


@pytest.mark.parametrize(("division", "patches"), [(2, 8), (4, 4), (5, 3), (16, 1)])
def test_pri_images_are_disjoint_and_together_all_patches(vit, division, patches):
    images = smi.invert(vit, method="pri", division=division, num_images=2 * division, iterations=20, progress=False)
    assert images.patches.shape == (2 * division, patches, 3, 4, 4)
    for trajectory in range(2):
        cells = images.index[images.trajectory == trajectory].flatten().tolist()
        assert len(set(cells)) == len(cells) == division * patches
    assert images.stage.tolist() == 2 * list(range(division))
    assert (images.labels.view(2, -1) == images.labels.view(2, -1)[:, :1]).all()


def test_pixels_are_valid(vit):
    images = smi.invert(vit, method="smi", num_images=3, **QUICK)
    low, high = (bound.view(-1, 1, 1).float() for bound in describe(vit).valid_range())
    assert (images.patches >= low).all()
    assert (images.patches <= high).all()


def test_smi_without_events_is_dense_bit_for_bit(vit):
    dense = smi.invert(vit, method="dense", num_images=3, **QUICK)
    assert same(smi.invert(vit, method="smi", prune_at=[], num_images=3, **QUICK), dense)
    assert same(smi.invert(vit, schedule=Schedule(16, 12), num_images=3, progress=False), dense)


@pytest.mark.parametrize("method", ["dense", "smi", "pri"])
@pytest.mark.parametrize("importance", ["cls_attention", "random"])
def test_same_seed_same_images(vit, method, importance):
    runs = [smi.invert(vit, method=method, num_images=9, importance=importance, seed=seed, **QUICK) for seed in (3, 3, 4)]
    assert same(runs[0], runs[1])
    assert not torch.equal(runs[0].patches, runs[2].patches)


def test_batch_size_changes_no_label_and_no_random_choice(vit):
    schedule = Schedule(16, 12, (Event(3, 5, "highest", "drop"),))
    runs = [
        smi.invert(vit, schedule=schedule, num_images=5, importance="random", batch_size=size, losses=[smi.losses.cross_entropy], **QUICK)
        for size in (1, 2, 5)
    ]
    for run in runs[1:]:
        assert torch.equal(run.labels, runs[0].labels)
        assert torch.equal(run.index, runs[0].index)


@pytest.mark.parametrize(("method", "number"), [("dense", 1), ("smi", 5), ("pri", 1), ("pri", 8), ("pri", 14)])
def test_the_number_of_images_is_exact(vit, method, number):
    images = smi.invert(vit, method=method, num_images=number, batch_size=2, **QUICK)
    assert len(images) == number
    assert len(smi.forward_sparse(vit, images)) == number


def test_labels_are_cycled_one_per_trajectory(vit):
    images = smi.invert(vit, method="pri", division=2, num_images=6, labels=[4, 1], **QUICK)
    assert images.labels.tolist() == [4, 4, 1, 1, 4, 4]
    assert smi.invert(vit, method="dense", num_images=40, iterations=1, progress=False).labels.unique().tolist() == [0, 1, 2, 3, 4]


def test_sequences_are_really_shorter(vit, monkeypatch):
    seen = []
    forward = engine.Fused.forward

    def watched(self, images, index, *rest):
        if not images.is_meta:  # the memory estimate runs without data
            seen.append(index.shape[1])
        output, *others = forward(self, images, index, *rest)
        assert output.attention.shape == index.shape
        return output, *others

    monkeypatch.setattr(engine.Fused, "forward", watched)
    smi.invert(vit, method="smi", num_images=2, prune_at=[3, 6], iterations=9, progress=False)
    assert seen == [16] * 3 + [11] * 3 + [7] * 3


def test_patches_that_left_get_no_gradient_and_do_not_move(vit):
    described = describe(vit)
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    index = torch.tensor([[0, 5, 6], [1, 2, 15]])
    engine.forward(described, images, index).logits.sum().backward()
    active = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, index, True).view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert (images.grad[~active.expand_as(images)] == 0).all()
    assert (images.grad[active.expand_as(images)] != 0).all()

    history = []
    smi.invert(
        vit,
        method="smi",
        num_images=2,
        prune_at=[4],
        iterations=9,
        on_iteration=lambda at: history.append((at.images.clone(), at.index)),
        progress=False,
    )
    gone = torch.ones(2, 16, dtype=torch.bool).scatter_(1, history[-1][1], False).view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    gone = gone.expand_as(images)
    assert torch.equal(history[-1][0][gone], history[3][0][gone])
    assert not torch.equal(history[-1][0][~gone], history[3][0][~gone])


def test_images_that_were_emitted_are_snapshots(vit):
    history = []
    images = smi.invert(vit, method="pri", division=2, num_images=2, on_iteration=lambda at: history.append(at.images.clone()), **QUICK)
    canvas = images[[0]].to_dense()
    present = canvas != 0
    assert torch.equal(canvas[present], history[5][present])


def test_the_published_default_loss_is_cross_entropy_and_batch_wide_total_variation(vit):
    images, logits, labels = torch.rand(3, 1, 2, 3), torch.randn(3, 5), torch.tensor([0, 1, 4])
    ce, tv = default_losses()
    assert math.isclose(ce(images, logits, labels), -sum(logits.log_softmax(1)[i, label] for i, label in enumerate(labels)) / 3, rel_tol=1e-5)
    x = images.double()
    norms = [
        math.sqrt(sum((x[b, 0, i, j] - x[b, 0, i + a, j + c]).item() ** 2 for b in range(3) for i, j, a, c in pairs))
        for pairs in (
            [(i, j, 0, 1) for i in range(2) for j in range(2)],
            [(0, j, 1, 0) for j in range(3)],
            [(0, j, 1, 1) for j in range(2)],
            [(1, j, -1, 1) for j in range(2)],
        )
    ]
    assert math.isclose(tv(x, logits, labels), 1e-4 * sum(norms), rel_tol=1e-12)


def test_own_losses_and_importance_are_used(vit):
    losses = [*default_losses(), lambda images, logits, labels: 100 * images.square().mean()]
    plain, pulled = (smi.invert(vit, method="dense", num_images=2, losses=terms, **QUICK) for terms in (None, losses))
    assert pulled.patches.square().mean() < plain.patches.square().mean()

    images = smi.invert(vit, method="pri", division=4, num_images=4, importance=lambda snapshot: -snapshot.index.float(), **QUICK)
    assert images.index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_init_of_any_layout_starts_the_same_run(vit):
    init = torch.randn(2, 3, 16, 16)
    layouts = (init, init.to(memory_format=torch.channels_last), init.clone().requires_grad_())
    plain, *others = (smi.invert(vit, method="smi", num_images=2, init=given, **QUICK) for given in layouts)
    assert all(same(plain, other) for other in others)


def test_inversion_lowers_the_loss(vit):
    losses = []
    smi.invert(vit, method="dense", num_images=4, iterations=40, on_iteration=lambda at: losses.append(at.loss), progress=False)
    assert losses[-1] < 0.5 * losses[0]


def test_reports_tell_where_the_run_is(vit):
    seen = []
    smi.invert(vit, method="pri", division=2, num_images=6, batch_size=2, on_iteration=seen.append, **QUICK)
    assert [(at.batch, at.iteration) for at in seen] == [(batch, t) for batch in range(2) for t in range(12)]
    assert {at.batches for at in seen} == {2}
    assert [at.active for at in seen[:12]] == [16] * 6 + [8] * 6
    assert [len(at.images) for at in (seen[0], seen[-1])] == [2, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "best"}, "unknown method 'best'"),
        ({}, "name a method"),
        ({"method": "dense", "num_images": 0}, "num_images must be a whole number from 1 to 1000000000, got 0"),
        ({"method": "dense", "batch_size": 0}, "batch_size must be"),
        ({"method": "dense", "seed": -1}, "seed must be a whole number from 0"),
        ({"method": "dense", "jitter": -1}, "jitter must be"),
        ({"method": "dense", "num_images": 10**10}, "num_images must be a whole number"),
        ({"method": "dense", "labels": [5]}, "labels must be whole numbers from 0 to 4"),
        ({"method": "dense", "labels": [-1]}, "labels must be whole numbers from 0 to 4"),
        ({"method": "dense", "labels": []}, "at least one class"),
        ({"method": "dense", "device": "tpu9"}, "device 'tpu9' cannot be used"),
        ({"method": "dense", "dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"method": "dense", "importance": "saliency"}, "unknown importance 'saliency'"),
        ({"method": "dense", "augmentation": [(0, 0, 0)]}, "one \\(dy, dx, flip\\) for each of the 12 iterations"),
        ({"method": "dense", "init": torch.zeros(1, 3, 8, 8)}, "init must be a tensor \\[2, 3, 16, 16\\]"),
        ({"method": "dense", "tv_weight": 0.1, "losses": [smi.losses.cross_entropy]}, "not both"),
        ({"method": "dense", "losses": []}, "at least one function"),
        ({"method": "dense", "losses": [lambda images, logits, labels: 3.0]}, "must return one number that depends"),
        ({"method": "dense", "losses": [lambda images, logits, labels: logits]}, "must return one number that depends"),
        ({"method": "dense", "tv_weight": float("nan")}, "tv_weight must be a finite number"),
        ({"method": "dense", "lr": -1.0}, "lr must be positive"),
        ({"method": "dense", "betas": (1, 1)}, "betas must be from 0 up to 1"),
        ({"method": "dense", "labels": ["cat"]}, "labels must be whole numbers, the classes to invert, got"),
        ({"method": "dense", "labels": [10**30]}, "labels must be whole numbers, the classes"),
        ({"method": "dense", "init": [[0.0]]}, "init must be a tensor"),
        ({"method": "dense", "device": "meta"}, "device 'meta' cannot be used"),
        ({"method": "dense", "augmentation": [(0.5, 0, 0)] * 12}, "in whole pixels"),
        ({"method": "dense", "augmentation": [None] * 12}, "in whole pixels"),
        ({"method": "smi", "iterations": 3}, "needs at least 4 iterations"),
        ({"method": "pri", "schedule": Schedule(16, 12)}, "not both"),
        ({"schedule": Schedule(16, 12), "division": 2}, "not both"),
        ({"schedule": "dense"}, "must be a smi.Schedule"),
        ({"method": "pri", "division": 17}, "division must lie between"),
        ({"schedule": Schedule(9, 12)}, "schedule is for 9 patches"),
        ({"method": "pri", "importance": lambda snapshot: torch.zeros(3)}, "importance must return scores"),
    ],
)
def test_bad_settings_are_refused(vit, settings, message):
    with pytest.raises(InputError, match=message):
        smi.invert(vit, **{"num_images": 2, **QUICK, **settings})


def test_a_loss_that_is_nan_stops_the_run_and_says_where(vit):
    calls = []

    def breaks(images, logits, labels):
        calls.append(1)
        return logits.sum() * (float("nan") if len(calls) == 5 else 0.0)

    with pytest.raises(RunError, match="the loss is nan at iteration 4"):
        smi.invert(vit, method="dense", num_images=1, losses=[breaks], **QUICK)


def test_weights_that_are_nan_are_refused(vit):
    with torch.no_grad():
        vit.blocks[1].attn.proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"NaN or infinity, first in blocks\.1\.attn\.proj\.weight"):
        smi.invert(vit, method="dense", num_images=1, **QUICK)


def test_out_of_memory_says_which_batch_fits(vit, monkeypatch):
    from smi.inversion import memory_estimate

    room = int(memory_estimate.step_memory(describe(vit), 4, 16, engine.Mode(torch.float32)).beside_weights * memory_estimate.CPU_SLACK) + 1
    monkeypatch.setattr(memory_estimate, "available_memory", lambda device: room)
    smi.invert(vit, method="dense", num_images=4, batch_size=4, dtype="float32", **QUICK)
    with pytest.raises(RunError, match="a batch of 5 trajectories needs .* about 4 fit: pass batch_size=4"):
        smi.invert(vit, method="dense", num_images=5, batch_size=5, dtype="float32", **QUICK)


def test_memory_estimate_counts_what_a_pass_holds(vit):
    """Without data as with data; and that is at least what autograd keeps for the backward pass."""
    from smi.inversion.memory_estimate import PeakMemory, step_memory

    described = describe(vit)
    kept = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in described.tensors()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(3, 3, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), PeakMemory() as memory:
        output = engine.forward(described, images, torch.arange(7).expand(3, -1), torch.zeros(3, dtype=torch.int32))
        torch.autograd.grad(output.logits.sum(), images)
    assert step_memory(described, 3, 7).pass_peak == pytest.approx(memory.peak, rel=0.2)
    assert memory.peak >= sum(kept.values()) - images.nbytes


@pytest.mark.slow
def test_memory_estimate_bounds_what_a_run_takes():
    code = """
import timm, smi, torch
from smi.engine import Mode
from smi.inversion.memory_estimate import CPU_SLACK, step_memory
from smi.models import describe
model = timm.create_model("deit_tiny_patch16_224")
peak = lambda: 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])  # not the parent's, as ru_maxrss
smi.invert(model, method="dense", num_images=1, iterations=1, dtype="float32", progress=False)
before = peak()
smi.invert(model, method="dense", num_images=12, iterations=3, dtype="float32", progress=False)
one, twelve = (step_memory(describe(model), batch, 196, Mode(torch.float32)).beside_weights for batch in (1, 12))
print((peak() - before) / ((twelve - one) * CPU_SLACK))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.4 < float(done.stdout) < 1.15


def test_float64_gradient_passes_gradcheck():
    model = small_vit(depth=1, img_size=8, embed_dim=8, num_heads=2).double()
    described = describe(model)
    index = torch.tensor([[0, 3], [1, 2]])
    augmentation = torch.tensor([1, -2, 1], dtype=torch.int32)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 3])

    def loss(x):
        logits = engine.forward(described, x, index, augmentation).logits
        return sum(term(x, logits, labels) for term in default_losses(0.1))

    assert torch.autograd.gradcheck(loss, images)
