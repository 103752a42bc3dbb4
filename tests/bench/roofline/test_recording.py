"""The engine's CUDA path on a device that is not there: what it launches, and what a real device would refuse."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench.measuring.record import ROOT
from bench.roofline.fake_device import fake_device
from bench.roofline.recording import Launch, Operation, TensorFacts
from bench.roofline.report import CASES
from smi import cost
from smi.models.vit import describe
from tests.bench.roofline.record import RUNS


@pytest.fixture(scope="module")
def recorded():
    """All runs and the step, recorded in one process, in which Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SMI_BACKEND")}
    done = subprocess.run([sys.executable, "-m", "tests.bench.roofline.record"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


RECORDED = [*(f"{name}, triton" for name in RUNS), *(f"{name}, stock" for name in ("dense", "smi", "pri")), "pri, triton, A10"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_a_run_gives_the_device_only_what_it_takes(recorded, name):
    """No tensor of the CPU for a kernel, no empty or too large grid, no wait for the device inside a capture; every update is a replay."""
    run, settings = recorded["runs"][name], RUNS[name.split(", ")[0] if name.split(", ")[0] in RUNS else ", ".join(name.split(", ")[:2])][1]
    assert not run["problems"]
    trajectories = 6 // settings.get("division", 1)
    batches = -(-trajectories // 4)
    assert run["replays"] == batches * settings["iterations"]
    stages = len(settings.get("prune_at", ())) + settings.get("division", 1)
    assert len(run["kernels"]) == batches * stages
    assert run["images"][0] == 6
    versions = {"linear_residual_fwd" in kernels for kernels in run["kernels"]}
    assert versions == {"stock" not in name}


@pytest.mark.slow
def test_chunks_run_the_model_for_every_part_of_the_batch(recorded):
    """Two passes forward, one backward, for each chunk."""
    whole, chunks = (recorded["runs"][f"{name}, triton"]["kernels"][0] for name in ("pri", "chunks"))
    parts = chunks["patch_embed_bwd"]
    assert parts > 1
    assert chunks["attention_fwd"] == 2 * parts * whole["attention_fwd"]
    assert chunks["adam_step"] == 1


@pytest.mark.slow
def test_a_captured_step_is_counted(recorded):
    """Kernels of twelve blocks, the last for the CLS token; FLOPs as `smi cost` counts them, and S, which attention's backward computes again."""
    import timm

    step, kernels = recorded["step"], recorded["step"]["kernels"]
    assert (kernels["attention_fwd"], kernels["attention_bwd"], kernels["linear_gelu_fwd"]) == (11, 11, 12)
    assert kernels["layer_norm_fwd"] == kernels["layer_norm_bwd"] == 24
    assert sum(kernels.values()) <= 209
    with torch.device("meta"):
        vit = describe(timm.create_model("deit_tiny_patch16_224"))
    recomputed = 11 * 2 * 47 * 47 * 192  # a GEMM more in each backward pass
    cls = 2 * 3 * 2 * 47 * 192  # attention of one query, which no GEMM computes
    assert step["flops"] == pytest.approx(128 * (cost.step_flops(vit, 46, cls_only=True) + recomputed - cls), rel=1e-3)
    assert step["bytes"] < 2.15e9  # the pixel gradient, 77 MB, is filled and written, not copied
    assert not step["spilling"]
    assert step["milliseconds"] <= next(case.most for case in CASES if case.title == "DeiT-Tiny")


@pytest.mark.slow
def test_the_work_of_a_kernel_follows_from_its_arguments(recorded):
    """linear_gelu forward of DeiT-Tiny, 6016 rows, 192 to 768: x, W and b read, y and f'(h) written, in bfloat16."""
    flops, executed, moved, rounds, streamed, beside = recorded["step"]["linear_gelu_fwd"]
    M, N, K = 6016, 768, 192
    assert (flops, rounds) == (2 * M * N * K, K // 64)
    assert executed == flops  # 94 rows of tiles of 64, and no rest
    assert moved == 2 * (M * K + N * K + N + 2 * M * N)
    assert beside == 2 * (N + 2 * M * N)
    assert streamed == 94 * 12 * 2 * (64 + 64) * K


# What the recording notices.


def test_a_tensor_of_the_cpu_and_an_illegal_grid_are_problems():
    with fake_device() as recording:
        recording.launch(Launch("kernel", (3, 1, 1), {"p_x": torch.empty(4, device="cuda:0"), "n": 4}, {}))
        assert not recording.problems
        recording.launch(Launch("kernel", (0,), {"p_x": torch.empty(4, device="cuda:0")}, {}))
        recording.launch(Launch("kernel", (1, 70000), {"p_x": torch.empty(4)}, {}))
    assert recording.problems == [
        "kernel was launched with the grid (0,)",
        "kernel was given p_x (4,) on the cpu",
        "kernel was launched with the grid (1, 70000)",
    ]


@pytest.mark.parametrize(
    ("wait", "message"),
    [
        (lambda x: float(x[0]), "_local_scalar_dense waits for the device inside a capture"),
        (lambda x: x.cpu(), "_to_copy, from one device to another, waits for the device inside a capture"),
        (lambda x: torch.cuda.synchronize(), "torch.cuda.synchronize waits for the device inside a capture"),
        (lambda x: torch.ones(3), "ones runs on the CPU inside a capture, which a replay does not repeat"),
    ],
    ids=["item", "copy", "synchronize", "cpu"],
)
def test_a_wait_inside_a_capture_is_a_problem(wait, message):
    with fake_device() as recording:
        x = torch.empty(4, device="cuda:0")
        wait(x)
        assert not recording.problems
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            wait(x)
    assert recording.problems == [message]


def test_operations_are_counted_by_what_they_touch():
    with fake_device() as recording:
        x, w = torch.empty(8, 16, device="cuda:0"), torch.empty(4, 16, device="cuda:0")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            y = x @ w.T
            y.view(2, 16)[0]
            y += torch.empty(1, 4, device="cuda:0").expand(8, 4)
            y.copy_(y + y)
    (mm, add, both, copy) = recording.steps[0]
    assert mm == Operation("mm", 4 * (8 * 16 + 4 * 16 + 8 * 4), 2 * 8 * 4 * 16, (8, 4, 16))
    assert add == Operation("add_", 4 * (2 * 8 * 4 + 4))
    assert both == Operation("add", 4 * 2 * 8 * 4)
    assert copy == Operation("copy_", 4 * 2 * 8 * 4)


def test_nothing_of_the_fake_device_stays():
    def stubs():
        return torch.cuda.graph, torch.cuda.Stream, torch.autograd.grad, torch.cuda.get_device_capability

    before = stubs()
    with fake_device():
        assert all(now is not then for now, then in zip(stubs(), before, strict=True))
        assert torch.cuda.get_device_capability() == (9, 0)
        assert TensorFacts.of(torch.empty(3, 1, device="cuda:0").expand(3, 5)).nbytes == 12
    assert stubs() == before
    assert type(torch.empty(2)) is torch.Tensor
