"""csrc without a GPU: the CUDA kernels themselves run on the CPU, emulated, against the reference; and what nvcc makes of them."""

import ctypes
import itertools
import re
import subprocess

import pytest
import torch
from torch import Tensor

from bench.executor import csrc as executed
from smi.csrc import build
from smi.csrc.cache import seal
from smi.kernels.attention import cuda
from smi.kernels.attention.reference import attention
from smi.kernels.precision import same_precision
from tests.kernels import emulator
from tests.kernels.checks import assert_close_enough

NUMBER_OF_TOKENS = (1, 2, 29, 47, 48, 50, 99, 197)
WIDTHS = (16, 64, 80)

needs_compiler = pytest.mark.skipif(not emulator.found(), reason="g++ is not on the PATH: the CUDA kernels cannot be emulated")
needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="nvcc is not found: csrc cannot be compiled")


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    return emulator.build(tmp_path_factory.mktemp("emulator"))


def example(n: int, width: int, dtype: torch.dtype, indexed: bool, ragged: bool, wide: bool = True) -> dict:
    """Two images of two heads. Rows that no token names, and tokens past a length, are NaN in `qkv`: reading one shows."""
    batch, heads, rows = 2, 2, n + 5 if indexed else n
    integer = torch.int64 if wide else torch.int32
    qkv = torch.randn(batch, rows, 3, heads, width).to(dtype)
    index = torch.stack([torch.randperm(rows)[:n] for _ in range(batch)]).to(integer) if indexed else None
    lengths = torch.tensor([n, n // 2 + 1], dtype=integer) if ragged else None
    grad = torch.randn(batch, n, heads * width).to(dtype)
    for b in range(batch):
        length = n if lengths is None else lengths[b]
        named = torch.arange(rows) if index is None else index[b].long()
        unread = torch.ones(rows, dtype=torch.bool)
        unread[named[:length]] = False
        qkv[b, unread] = float("nan")
        grad[b, length:] = float("nan")
    return {"qkv": qkv, "index": index, "lengths": lengths, "grad": grad, "scale": width**-0.5}


def run_reference(case: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and gradient in `dtype`, the NaN of `example` made zero: they are nobody's."""
    qkv = case["qkv"].nan_to_num(0).to(dtype).requires_grad_()
    with same_precision():
        out = attention(qkv, case["index"], case["lengths"], case["scale"])
    return out.detach(), torch.autograd.grad(out, qkv, case["grad"].nan_to_num(0).to(dtype))[0]


def run_emulated(library: ctypes.CDLL, case: dict, order: str = "ascending", device: str = "9.0") -> tuple[Tensor, Tensor, Tensor]:
    machine = emulator.Emulator(library, order, device)
    arguments = case["index"], case["lengths"]
    out, lse = machine.forward(case["qkv"], *arguments, case["scale"])
    return out, lse, machine.backward(case["grad"], case["qkv"], *arguments, out, lse, case["scale"])


def check(library: ctypes.CDLL, case: dict, dtype: torch.dtype, order: str = "ascending", device: str = "9.0") -> None:
    out, _, grad = run_emulated(library, case, order, device)
    true_out, true_grad = run_reference(case, torch.float64)
    plain_out, plain_grad = run_reference(case, dtype)
    assert_close_enough("out", out, plain_out, true_out)
    assert_close_enough("dqkv", grad, plain_grad, true_grad)
    assert not grad[true_grad == 0].any() or case["qkv"].shape[1] == 1, "rows that are no token's must have no gradient"


@needs_compiler
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", NUMBER_OF_TOKENS)
@pytest.mark.parametrize(("indexed", "ragged"), [(False, False), (True, True)], ids=["all", "index and lengths"])
def test_emulated_attention_meets_the_error_rule(library, n, width, indexed, ragged):
    check(library, example(n, width, torch.bfloat16, indexed, ragged), torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize(("indexed", "ragged"), [(True, False), (False, True)], ids=["index", "lengths"])
@pytest.mark.parametrize("n", [47, 99])
def test_index_and_lengths_alone_in_int32_and_float16(library, n, indexed, ragged):
    check(library, example(n, 64, torch.float16, indexed, ragged, wide=False), torch.float16)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 72, 80, 128])
@pytest.mark.parametrize("n", [1, 29])
def test_a_token_alone_has_the_weight_one(library, n, width, dtype):
    """Whatever its score is rounded to: the rule allows no error where PyTorch makes none. Alone in its image, too."""
    for _ in range(8):
        case = example(n, width, dtype, True, False) | {"lengths": torch.ones(2, dtype=torch.int64)}
        case["grad"][:, 1:] = float("nan")
        check(library, case, dtype)


@needs_compiler
@pytest.mark.parametrize(("n", "width"), [(33, 72), (65, 8), (17, 24), (120, 128), (192, 80), (256, 32)])
def test_padded_widths_and_the_largest_sizes(library, n, width):
    check(library, example(n, width, torch.bfloat16, False, False), torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize(("n", "device", "spans"), [(99, "9.0", 2), (144, "8.6", 1), (197, "8.0", 2), (256, "9.0", 2)])
def test_chunks_of_queries_as_many_as_shared_memory_holds(library, n, device, spans):
    emulator.Emulator(library, device=device)
    assert library.smi_shared_bytes(n, 64, 1) == -(-n // 16) * 16 * (4 * 128 + spans * 128 + 8)
    check(library, example(n, 64, torch.bfloat16, False, True), torch.bfloat16, device=device)


@needs_compiler
@pytest.mark.parametrize(("n", "device"), [(47, "9.0"), (99, "9.0"), (99, "8.6")])
def test_results_do_not_depend_on_the_order_of_threads(library, n, device):
    """Bit for bit: a race, or a sum whose order is not fixed, would show. Nor on how many queries are a chunk."""
    case = example(n, 64, torch.bfloat16, True, True)
    results = [run_emulated(library, case), *(run_emulated(library, case, order, device) for order in emulator.ORDERS)]
    for other, tensor in itertools.product(range(1, len(results)), range(3)):
        torch.testing.assert_close(results[other][tensor], results[0][tensor], rtol=0, atol=0)


@needs_compiler
@pytest.mark.parametrize("n", [47, 197])
def test_log_sum_exp_and_zeros_past_the_length(library, n):
    case = example(n, 64, torch.bfloat16, False, True)
    out, lse, _ = run_emulated(library, case)
    q, k = (case["qkv"][:, :, i].double().transpose(1, 2) for i in range(2))
    for b, length in enumerate(case["lengths"]):
        truth = (case["scale"] * q[b, :, :length] @ k[b, :, :length].transpose(-1, -2)).logsumexp(-1)
        torch.testing.assert_close(lse[b, :, :length].double(), truth, rtol=1e-6, atol=1e-5)
        assert not out[b, length:].any()
        assert not lse[b, :, length:].any()


@needs_compiler
def test_scale_of_any_sign_and_large_scores(library):
    """The running maximum keeps exponentials finite, for a negative scale too."""
    case = example(99, 64, torch.bfloat16, False, False) | {"scale": -4.0}
    check(library, case, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("n", [47, 99])
def test_keys_that_are_not_there_weigh_nothing_where_all_scores_are_very_low(library, n):
    """Every score is about -512: a padding key, whose score is 0, would have the weight exp(500) and turn dQ into NaN."""
    case = example(n, 64, torch.bfloat16, False, False)
    case["qkv"] *= 0.05
    case["qkv"][:, :, 0] += 8
    case["qkv"][:, :, 1] -= 8
    check(library, case, torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("width", [32, 64, 80, 128])
@pytest.mark.parametrize("n", [48, 80])
def test_no_bank_conflicts(library, n, width):
    """Every 8x8 matrix is read, and every fragment written, in one pass over the banks of shared memory."""
    case = example(n, width, torch.bfloat16, False, False)
    machine = emulator.Emulator(library)
    out, lse = machine.forward(case["qkv"], None, None, case["scale"])
    forward = machine.counters
    assert (forward.matrix_conflicts, forward.store_conflicts) == (0, 0)
    # scores and P v: two products of 16 x 8 x 16 for every 16 x 16 x 16, nothing padded beyond tiles of 16
    assert forward.products == 2 * 2 * 2 * 2 * (n // 16) ** 2 * (width // 16)
    machine.backward(case["grad"], case["qkv"], None, None, out, lse, case["scale"])
    assert (machine.counters.matrix_conflicts, machine.counters.store_conflicts) == (0, 0)
    assert machine.counters.products == 2 * 2 * 2 * 5 * (n // 16) ** 2 * (width // 16)  # five products, none computed twice


@needs_compiler
def test_the_executor_of_ptx_chooses_as_the_launch_does(library):
    emulator.Emulator(library, device="8.0")
    for width, most in cuda.MOST_TOKENS.items():
        for backward, tokens in itertools.product((False, True), range(1, most + 1)):
            assert executed.choose(backward, width, tokens).shared == library.smi_shared_bytes(tokens, width, int(backward))


@needs_compiler
def test_limits_are_those_of_the_sources(library):
    """MOST_TOKENS of cuda.py against csrc, and shared memory within what each generation gives a block."""
    for width, most in cuda.MOST_TOKENS.items():
        assert library.smi_most_tokens(width) == most
        for limits, device in ((cuda.MOST_TOKENS, "9.0"), (cuda.MOST_TOKENS, "8.0"), (cuda.MOST_TOKENS_99KB, "8.6")):
            emulator.Emulator(library, device=device)
            needed = [library.smi_shared_bytes(n, width, backward) for n in range(1, limits[width] + 1) for backward in (0, 1)]
            assert max(needed) <= emulator.ROOMS[device][0], (width, device)
    assert cuda.supports(47, 64, torch.bfloat16) is None
    assert "not 257" in cuda.supports(257, 64, torch.bfloat16)
    assert "not 60" in cuda.supports(47, 60, torch.bfloat16)
    assert "not float32" in cuda.supports(47, 64, torch.float32)


@needs_compiler
@pytest.mark.parametrize(
    ("mutation", "file"),
    [
        (("sync_block();  // P and dS are complete", "//"), "attention_backward_strip.cuh"),
        (("sync_block();  // dS is complete", "//"), "attention_backward_chunks.cuh"),
        (("copy_wait<0>();", ""), "attention_forward.cuh"),
        (("i % 2 >= at.real", "i % 2 > at.real"), "attention_forward.cuh"),
        (("p.scale, s_k, 1", "1.f, s_k, 1"), "attention_backward_strip.cuh"),
    ],
    ids=["missing barrier", "missing barrier of a chunk", "missing wait", "mask off by one", "dropped scale"],
)
def test_the_emulation_sees_faults(tmp_path, mutation, file):
    """The same kernels with one fault each: the checks above must fail, in some order of threads."""
    folder = tmp_path / "csrc"
    for name in ("cuda", "emulate"):
        (folder / name).mkdir(parents=True)
    for path in [*emulator.CSRC.glob("cuda/*.h"), *emulator.CSRC.glob("cuda/*.cuh"), *emulator.CSRC.glob("emulate/*")]:
        text = path.read_text()
        if path.name == file:
            assert text.count(mutation[0]) >= 1
            text = text.replace(*mutation)
        (folder / path.relative_to(emulator.CSRC)).write_text(text)
    faulty = emulator.build(tmp_path, folder, "-O1", "-DSMI_EMULATE_ONE_WIDTH=64")

    def passes(n: int, order: str) -> bool:
        try:
            check(faulty, example(n, 64, torch.bfloat16, False, True), torch.bfloat16, order)
        except (AssertionError, RuntimeError):
            return False
        return True

    assert not all(passes(n, order) for n in (47, 99) for order in emulator.ORDERS)


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_nvcc_keeps_everything_in_registers_and_uses_tensor_cores(tmp_path, architecture):
    """Width 64, the one that matters most; the compile gate does the others."""
    binary = tmp_path / "attention.cubin"
    command = [build.nvcc(), *build.FLAGS, "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-o", binary, build.FOLDER / "attention_64.cu"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == 16  # bf16 and fp16, forward and backward, 2, 3, 4 and more tiles
    assert set(spills) == {("0", "0", "0")}
    cubin = pytest.importorskip("bench.gates.cubin")
    text = subprocess.run([cubin.tool("cuobjdump"), "-sass", binary], check=True, capture_output=True, text=True).stdout
    for kernel in text.split("Function : ")[1:]:
        assert "HMMA.16816.F32" in kernel
        assert "LDGSTS.E.BYPASS.128" in kernel
        assert "LDSM.16.M88.4" in kernel
        assert "LDL" not in kernel
        assert "RED." not in kernel
        assert "ATOM" not in kernel


@needs_nvcc
def test_bindings_compile_and_see_only_stable_headers(tmp_path):
    """For every library; they need none of CUTLASS's headers."""
    if build.why_not():
        pytest.skip(build.why_not())
    for library in build.LIBRARIES:
        options = [*build.flags(library._replace(cutlass=False)), "-I", build.torch_folder() / "include"]
        subprocess.run([build.nvcc(), *options, "-c", build.FOLDER / "bindings.cpp", "-o", tmp_path / "bindings.o"], check=True)
    including = [path.name for path in build.FOLDER.iterdir() if path.suffix in {".cpp", ".cu", ".cuh", ".h"} and "torch/" in path.read_text()]
    assert including == ["bindings.cpp"]
    headers = re.findall(r"#include <(torch/[^>]*)>", (build.FOLDER / "bindings.cpp").read_text())
    assert all(header.startswith(("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")) for header in headers)


def test_architectures_as_torch_lists_them():
    assert build.architecture_flags("8.0+PTX;9.0a") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


def test_a_build_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(build, "nvcc", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert build.why_not() == "nvcc is neither on the PATH nor in CUDA_HOME"
    assert build.extensions() == []


def test_without_a_device_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable.__wrapped__() == "no CUDA device"


def test_a_machine_without_nvcc_is_told_why(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "nvcc", lambda: None)
    monkeypatch.setattr(build, "BUILT", tmp_path / "none.so")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "cannot be built: nvcc is neither on the PATH nor in CUDA_HOME" in cuda.unavailable.__wrapped__()
    build.cached_library("9.0a").parent.mkdir(parents=True)
    build.cached_library("9.0a").touch()
    seal(build.cached_library("9.0a"))
    assert cuda.unavailable.__wrapped__() is None  # built earlier
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0" in cuda.unavailable.__wrapped__()


def test_a_build_that_fails_is_a_reason_and_a_line(monkeypatch, tmp_path, capsys):
    def fails(target, architectures, library):
        raise RuntimeError("no such header")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(build, "BUILT", tmp_path / "none.so")
    monkeypatch.setattr(build, "compile_library", fails)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not cuda.is_built()
    assert cuda.ensure_built.__wrapped__() == "the CUDA library cannot be built here: no such header"
    assert "attention runs in another version" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 64, 72, 80, 128])
@pytest.mark.parametrize("n", [1, 29, 47, 50, 99, 128])
def test_attention_on_the_device(n, width, dtype):
    """The same checks where there is a GPU, and twice the same bits."""
    if cuda.unavailable():
        pytest.skip(cuda.unavailable())
    case = example(n, width, dtype, True, True)
    there = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in case.items()}
    runs = []
    for _ in range(2):
        out, lse = cuda.forward(there["qkv"], there["index"], there["lengths"], there["scale"])
        runs.append((out, cuda.backward(there["grad"], there["qkv"], there["index"], there["lengths"], out, lse, there["scale"])))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    true_out, true_grad = run_reference(case, torch.float64)
    plain_out, plain_grad = run_reference(case, dtype)
    assert_close_enough("out", runs[0][0].cpu(), plain_out, true_out)
    assert_close_enough("dqkv", runs[0][1].cpu(), plain_grad, true_grad)
