"""What surrounds a public call changes nothing in it, and is as it was afterwards: every entry point under every hostile surrounding, bit for bit."""

import random
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import smi
from smi.distillation.students import make_student
from smi.models.by_name import load_model
from smi.models.folder import load_model_folder, save_model
from tests.conftest import small_vit

pytestmark = pytest.mark.fast
QUICK = {"method": "smi", "num_images": 2, "iterations": 5, "labels": [1, 3]}


def model():
    """In training mode, with dropout, one module of it in evaluation mode and one weight frozen: what a call may borrow and not keep."""
    made = small_vit(proj_drop_rate=0.3, drop_path_rate=0.2).train()
    made.blocks[0].eval()
    made.blocks[1].mlp.fc1.weight.requires_grad_(False)
    return made


def images():
    draw = torch.Generator().manual_seed(3)
    patches = torch.randn(6, 5, 3, 4, 4, generator=draw, dtype=torch.float32)
    index = torch.rand(6, 16, generator=draw, dtype=torch.float32).argsort(1)[:, :5].sort(1).values
    labels, trajectory = torch.tensor([0, 1, 2, 3, 4, 0]), torch.arange(6)
    return smi.SparseImages(patches, index, labels, trajectory, torch.zeros(6, dtype=torch.long), (4, 4), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def pixels(**options):
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float32, device="cpu").requires_grad_(**options)


def accelerated(given, images):
    return [smi.accelerate(given)(pixels())]


def dropped_in(given, images):
    logits, attentions, index = smi.drop_in(given)(pixels())
    return [logits, attentions[-1], index]


@cache
def student():
    """Made once, where nothing surrounds it."""
    return small_vit(seed=1, proj_drop_rate=0.3)


def distilled(given, images):
    result = smi.distill(given, student(), images, steps=3, batch_size=3, eval_every=1, progress=False)
    return [*result.student.state_dict().values(), torch.tensor([row["kl"] for row in result.curve], dtype=torch.float64, device="cpu")]


def quantised(given, images):
    return list(smi.quantize(given, images).state_dict().values())


@cache
def quantised_model():
    """Made once, where nothing surrounds it."""
    return smi.quantize(model(), images())


def called_quantised(given, images):
    simulated = quantised_model()
    return [simulated(images), simulated.int8()(images)]


def evaluated(given, images):
    found = smi.evaluate(images, given, verifier=given)
    return [torch.tensor([found.teacher.confidence, found.verifier.recognition.cross_entropy], dtype=torch.float64, device="cpu")]


def tensors(made):
    return [made.patches, made.index, made.labels]


ENTRY_POINTS = {
    "invert": lambda given, images: tensors(smi.invert(given, **QUICK, progress=False)),
    "invert by reference": lambda given, images: tensors(smi.invert(given, **QUICK, engine="reference", progress=False)),
    "psaq": lambda given, images: tensors(smi.invert(given, method="psaq", num_images=1, iterations=2, labels=[0], progress=False)),
    "invert_batches": lambda given, images: [x for made in smi.invert_batches(given, **QUICK, batch_size=1) for x in tensors(made)],
    "forward_sparse": lambda given, images: [smi.forward_sparse(given, images)],
    "evaluate": evaluated,
    "accelerate": accelerated,
    "drop_in": dropped_in,
    "distill": distilled,
    "quantize": quantised,
    "quantised model": called_quantised,
    "make_student": lambda given, images: list(make_student("small", given, seed=2).state_dict().values()),
}
SLOW = ("quantize", "distill")  # they take seconds, and stand under everything at once


@contextmanager
def state(read, change):
    """A global state that `change` makes hostile; `read` gives it, to be put back."""
    before = read()
    change()
    try:
        yield
    finally:
        change(before)


def flags(value=True):
    torch.use_deterministic_algorithms(value)


SURROUNDINGS = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 by default": lambda: state(torch.get_default_dtype, lambda dtype=torch.float64: torch.set_default_dtype(dtype)),
    "bfloat16 by default": lambda: state(torch.get_default_dtype, lambda dtype=torch.bfloat16: torch.set_default_dtype(dtype)),
    "meta by default": lambda: torch.device("meta"),
    "set_default_device": lambda: state(lambda: None, lambda *device: torch.set_default_device(*(device or ("meta",)))),
    "deterministic": lambda: state(torch.are_deterministic_algorithms_enabled, flags),
    "GEMMs in bfloat16": lambda: state(torch.get_float32_matmul_precision, lambda p="medium": torch.set_float32_matmul_precision(p)),
    "other generators": lambda: state(lambda: None, lambda *_: (torch.manual_seed(77), np.random.seed(77), random.seed(77))),  # noqa: NPY002
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=False),
}
TOGETHER = ("no_grad", "autocast", "float64 by default", "meta by default", "deterministic", "GEMMs in bfloat16", "other generators")


@contextmanager
def everything_at_once():
    with ExitStack() as stack:
        for name in TOGETHER:
            stack.enter_context(SURROUNDINGS[name]())
        yield


CASES = [(name, surrounding) for name in ENTRY_POINTS if name not in SLOW for surrounding in SURROUNDINGS]
CASES += [pytest.param(name, "everything at once", marks=pytest.mark.slow) for name in SLOW]


def snapshot(given):
    """The global state, and the user's model."""
    return {
        "generators": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "flags": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "modes": [module.training for module in given.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks) for module in given.modules()],
        "requires_grad": [(weight.requires_grad, weight.grad is None, weight._version) for weight in given.parameters()],
        "weights": [(weight.data_ptr(), weight.device, weight.dtype) for weight in given.parameters()],
    }


@pytest.fixture(scope="module")
def plain():
    """What every entry point gives where nothing surrounds it, computed when it is asked for."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = ENTRY_POINTS[name](model(), images())
        return found[name]

    return of


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(("name", "surrounding"), CASES)
def test_surroundings_change_nothing_and_are_left_as_they_were(name, surrounding, plain):
    want, given, made = plain(name), model(), images()
    with (SURROUNDINGS | {"everything at once": everything_at_once})[surrounding]():
        before = snapshot(given)
        got = ENTRY_POINTS[name](given, made)
        after = snapshot(given)
    assert len(got) == len(want)
    for one, two in zip(got, want, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one.detach(), two.detach())
    for what in before:
        assert before[what] == after[what], what


def test_pixel_gradients_under_hostile_surroundings():
    given = model()

    def gradient():
        x = pixels()
        (found,) = torch.autograd.grad(smi.accelerate(given)(x).square().sum(), x)
        return found

    want = gradient()
    for name in ("autocast", "float64 by default", "meta by default", "deterministic", "GEMMs in bfloat16"):
        with SURROUNDINGS[name]():
            assert torch.equal(gradient(), want), name


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_weights_that_change_between_batches_change_nothing(engine):
    """Nor does what else was given and is changed while the run goes on."""

    def run(disturb):
        given, noise, labels, table = small_vit(), pixels(requires_grad=False), torch.tensor([1, 3]), torch.zeros(4, 3, dtype=torch.int32)
        settings = {"method": "smi", "num_images": 2, "iterations": 4, "batch_size": 1, "engine": engine, "dtype": "float32"}
        parts = []
        for part in smi.invert_batches(given, init=noise, labels=labels, augmentation=table, **settings):
            parts.append(part)
            if disturb:
                with torch.no_grad():
                    for tensor in (*given.parameters(), noise, labels, table):
                        tensor.copy_(tensor * 0 + 1)
        return smi.SparseImages.cat(parts)

    quiet, disturbed = run(False), run(True)
    assert torch.equal(quiet.patches, disturbed.patches)
    assert torch.equal(quiet.labels, disturbed.labels)
    assert quiet.provenance["weights_sha256"] == disturbed.provenance["weights_sha256"]


def test_between_two_batches_the_surroundings_are_the_callers():
    seen = []
    with torch.no_grad(), torch.autocast("cpu"):
        for _ in smi.invert_batches(small_vit(), **QUICK, batch_size=1):
            seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    assert seen == [(False, True)] * 2


def test_the_chosen_dtype_is_the_same_every_time_and_draws_nothing():
    from smi.engine import dtype

    before, chosen = torch.get_rng_state(), set()
    for _ in range(3):
        dtype._processor_flags.cache_clear()
        chosen.add(dtype.choose_dtype(torch.device("cpu")))
    assert len(chosen) == 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("flags", "chosen"), [({"avx2", "avx512_bf16"}, "bfloat16"), ({"amx_bf16"}, "bfloat16"), ({"avx2", "avx512f"}, "float32")])
def test_the_chosen_dtype_follows_the_instruction_set_and_says_so(flags, chosen, monkeypatch):
    from smi.engine import dtype

    monkeypatch.setattr(dtype, "_processor_flags", lambda: flags)
    assert dtype.choose_dtype(torch.device("cpu")) == getattr(torch, chosen)
    assert dtype.why_dtype(torch.device("cpu")).startswith(f"{chosen}: the processor ")


def test_models_are_read_and_written_in_any_surroundings(tmp_path):
    save_model(small_vit(), tmp_path / "plain")
    with torch.autocast("cpu"), torch.no_grad():
        save_model(small_vit(), tmp_path / "other")
        loaded = [load_model_folder(tmp_path / name) for name in ("plain", "other")]
    x = pixels(requires_grad=False)
    assert torch.equal(*(each(x) for each in loaded))
    before = torch.get_rng_state()
    assert isinstance(load_model("digits"), nn.Module)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_are_inference_tensors():
    with torch.inference_mode():
        given = small_vit()
    want = smi.accelerate(small_vit(), dtype="float32")(pixels())
    assert torch.equal(smi.accelerate(given, dtype="float32")(pixels()), want)
    assert isinstance(smi.invert(given, **QUICK, progress=False).patches, Tensor)


def test_images_are_evaluated_on_a_device_without_moving_the_model():
    given = small_vit()
    smi.evaluate(images(), given, device="cpu")
    fast = smi.accelerate(given).to("meta")
    assert next(fast.parameters()).device.type == "meta"
    assert all(weight.device.type == "cpu" for weight in given.parameters())
