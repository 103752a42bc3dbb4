"""FLOPs: the published figures, the honest count against PyTorch's own counter, the theorem."""

import json

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from smi import cost
from smi.cli.main import run
from smi.engine import forward
from smi.inversion.schedules import make_schedule
from smi.models.vit import describe

pytestmark = pytest.mark.fast


def meta(name, **options):
    with torch.device("meta"):
        return describe(timm.create_model(name, **options))


@pytest.mark.parametrize(
    ("model", "method", "published"),
    [
        ("deit_tiny_patch16_224", "dense", 414.20),
        ("deit_tiny_patch16_224", "smi", 107.32),
        ("deit_base_patch16_224", "dense", 6475.63),
        ("deit_base_patch16_224", "smi", 1578.97),
    ],
)
def test_the_four_published_figures(model, method, published, capsys):
    assert run(["cost", "--model", model, "--method", method, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["published_gflops"] == pytest.approx(published, rel=1e-4)


@pytest.mark.parametrize("division", [2, 4, 7])
def test_pri_costs_what_the_paper_says_in_the_linear_layers(division, capsys):
    assert run(["cost", "--model", "deit_base_patch16_224", "--method", "pri", "--division", str(division), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    (theorem,) = table["theorem"]
    assert theorem["pri_linear"] == pytest.approx((division + 1) / (2 * division**2))
    schedule = make_schedule("pri", 196, 4000, division=division)
    counted = sum((stage.stop - stage.start) * stage.active for stage in schedule.stages()) / (4000 * 196) / division
    assert counted == pytest.approx(theorem["pri_linear"], rel=1e-2)  # 4000 is not a multiple of 7


@pytest.mark.parametrize("active", [46, 196])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_the_honest_count_is_pytorchs(name, active):
    vit = meta(name, num_classes=10)
    images = torch.empty(3, 3, *vit.image_size, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        logits = forward(vit, images, torch.empty(3, active, device="meta", dtype=torch.int64)).logits
        torch.autograd.grad(logits.sum(), images)
    assert counter.get_total_flops() == 3 * cost.step_flops(vit, active)


def test_the_floor_computes_the_last_block_for_cls_alone():
    vit = meta("deit_base_patch16_224")
    saved = cost.step_flops(vit, 196) - cost.step_flops(vit, 196, cls_only=True)
    linear = 4 * 196 * 10 * 768**2  # 10 of the 12 d^2 of a block for all tokens but CLS, forward and backward
    attention = 2 * 3 * 196 * (2 * 197 * 768)  # both products for their queries, twice as much backward
    row = 2 * (2 * 197 * 768)  # the CLS row comes for free
    assert saved == linear + attention + row


def test_total_is_the_sum_over_stages():
    vit = meta("deit_tiny_patch16_224")
    schedule = make_schedule("smi", 196, 4000)
    expected = sum(iterations * cost.step_flops(vit, n) for iterations, n in ((50, 196), (50, 137), (100, 95), (100, 66), (3700, 46)))
    assert cost.trajectory_flops(vit, schedule) == expected


def test_theorem_bound_is_where_the_two_are_equal():
    for division in (2, 4, 7):
        bound = cost.theorem(196, 768, division).bound
        assert bound > 3
        equal = cost.theorem(round(bound * 10_000), 10_000, division)
        assert equal.pri_attention == pytest.approx(equal.smi_attention, rel=1e-3)
        assert cost.theorem(29_000, 10_000, division).pri_attention < cost.theorem(29_000, 10_000, division).smi_attention


def test_tables_are_printed(capsys):
    assert run(["cost", "--model", "deit_tiny_patch16_224"]) == 0
    out = capsys.readouterr().out
    assert "414.20" in out
    assert "theorem" in out
