"""The key cases under pytest-benchmark: `pytest bench --benchmark-only`, with its options to save and compare.

Every benchmark is one side of one case; `python -m bench.run` measures the sides in turn and is what result files are made of.
"""

import pytest
import torch

from bench.cases import suites
from bench.cases.operations import CPU_BATCH, GPU_BATCH, cls_case, gelu_case, norm_case, residual_case
from bench.measuring.budget import wall_seconds
from bench.measuring.inversions import run_whole
from bench.measuring.operations import steps, timed_versions
from bench.sides.make import build_model, make_step
from smi.inversion.schedules import make_schedule
from smi.models.vit import describe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHOSEN = suites.quick_on_cpu() if DEVICE.type == "cpu" else suites.on_gpu()
OPERATIONS_BATCH = CPU_BATCH if DEVICE.type == "cpu" else GPU_BATCH
ROUNDS = 5


@pytest.mark.parametrize("side", suites.ALL_SIDES)
@pytest.mark.parametrize("case", CHOSEN.steps[:4], ids=lambda case: case.name)
def test_step(benchmark, case, side):
    if side not in case.sides:
        pytest.skip(f"{side} is not among the sides of this case")
    torch._dynamo.reset()
    step = make_step(side, build_model(case.model, dict(case.options), DEVICE), case.batch, case.active)
    benchmark.extra_info["resolved"] = step.resolved
    benchmark.pedantic(lambda: wall_seconds(step, DEVICE), rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("side", suites.TWO_SIDES)
@pytest.mark.parametrize(("method", "options"), suites.METHODS, ids=lambda value: value if isinstance(value, str) else str(value.get("division", "")))
def test_whole_run(benchmark, method, options, side):
    """A short run of DeiT-Tiny: events, emission and set-up included."""
    model = build_model(suites.TINY, {}, DEVICE)
    case = suites.WholeCase(suites.TINY, method, options.get("division"), 2, 2, (14,))
    benchmark.extra_info["images"] = 2 * make_schedule(method, describe(model).num_patches, 14, **options).images_per_trajectory
    benchmark.pedantic(lambda: run_whole(case, side, model, 14), rounds=1, warmup_rounds=0)


@pytest.mark.parametrize("make", [norm_case, gelu_case, residual_case, cls_case], ids=lambda make: make.__name__)
@pytest.mark.parametrize("tokens", [47, 197])
def test_operation(benchmark, make, tokens):
    """Forward and backward of our version."""
    case = make(tokens, OPERATIONS_BATCH)
    example = case.build(DEVICE, torch.float32)
    version = timed_versions(case.operation, DEVICE)[-1]
    step = steps(case, example, DEVICE, compiled=False)[version]
    benchmark.extra_info["version"] = version
    benchmark.pedantic(lambda: wall_seconds(step, DEVICE), rounds=ROUNDS, warmup_rounds=1)
