"""The model of a kernel's time: from made-up code and launches, whose times follow by hand."""

import pytest
import torch

from bench.roofline import compiled_code, model, report
from bench.roofline.compiled_code import Code
from bench.roofline.model import H200, Estimate, estimate, resident
from bench.roofline.recording import Launch, Operation, TensorFacts

pytestmark = pytest.mark.fast


def code(registers=128, shared=98304, warps=8, instructions=1000, loop=100):
    return Code(registers, shared, 0, warps, instructions, loop)


@pytest.mark.parametrize(
    ("changes", "programs"),
    [({}, 2), ({"registers": 129}, 1), ({"shared": 131072}, 1), ({"registers": 32, "shared": 0, "warps": 4}, 16), ({"shared": 0, "warps": 1}, 16)],
)
def test_programs_of_a_multiprocessor(changes, programs):
    """Two of 128 registers and 96 KiB; one register or one stage more, and one is left."""
    assert resident(code(**changes)) == programs


def gemm(M=132 * 128, N=128, K=768, stages=3, **changes):
    """A launch of linear_residual_bwd_gelu by 128 x 128 x 64, one program for every multiprocessor by default."""

    shapes = {"p_dy": (M, K), "p_w": (K, N), "p_h": (M, N), "p_dh": (M, N)}
    tensors = {name: TensorFacts(shape, torch.bfloat16, at, 2 * shape[0] * shape[1]) for at, (name, shape) in enumerate(shapes.items())}
    sizes = {"M": M, "N": N, "K": K, "BM": 128, "BN": 128, "BK": 64}
    return Launch("linear_residual_bwd_gelu", (-(-M // 128) * -(-N // 128),), tensors | sizes, {"num_stages": stages}, code(**changes))


@pytest.fixture(autouse=True)
def made_up_code(monkeypatch):
    monkeypatch.setattr(model, "code_of", lambda compiled: compiled)


def test_one_program_waits_for_its_loop_and_then_for_its_epilogue():
    found = estimate(gemm(shared=131072))
    operands = 12 * 2 * (128 + 128) * 64 / (H200.l2 / 132)  # longer than the tensor cores need
    epilogue = 900 * 8 / H200.issue + 2 * 2 * 128 * 128 / (H200.bandwidth / 132)
    assert found.seconds == pytest.approx(H200.latency + operands + epilogue, rel=1e-2)
    assert (found.bound, found.resident, found.rounds) == ("waiting", 1, 1.0)


def test_two_programs_overlap_until_a_unit_is_busy():
    one, two = (estimate(gemm(M=132 * 128 * 40, N=768, **changes)) for changes in ({"shared": 131072}, {}))
    assert two.resident == 2
    assert two.bound == "L2"
    assert two.seconds < 0.7 * one.seconds


def test_a_loop_of_one_stage_waits_for_every_load():
    prefetched, waiting = (estimate(gemm(stages=stages)).seconds for stages in (3, 1))
    assert waiting - prefetched > 11 * H200.latency


def test_a_wave_more_for_one_program_more():
    full, more = (estimate(gemm(M=rows * 128, shared=131072)).seconds for rows in (132, 133))
    assert more == pytest.approx(2 * full, rel=1e-2)


def test_operations_take_their_bytes_or_a_launch():
    assert estimate(Operation("add", 43_000_000)).seconds == pytest.approx(11e-6)
    assert estimate(Operation("add", 100)) == Estimate("add", 2e-6, "launch", 0, 100)
    large = Operation("mm", 400_000_000, 2 * 8192**3, (8192, 8192, 8192))
    assert estimate(large).seconds == pytest.approx(2 * 8192**3 / 790e12, rel=0.05)  # the measured GEMM itself


def test_the_longest_loop_of_a_disassembly():
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/               @P1 BRA 0x10 ;
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0040*/                   FFMA R4, R4, R4, R4 ;
        /*0050*/              @!P0 BRA 0x30 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
        /*0080*/                   NOP;
    """
    found = compiled_code.instructions_of(text)
    assert len(found) == 8
    assert compiled_code.longest_loop(found) == 3


def test_the_table_of_a_step():
    long, short = Estimate("long", 3e-3, "bytes", 790e9, 4_300_000, 132, 2, 1.0, code(), "128x128x64"), Estimate("short", 2e-6, "launch", 0, 8)
    lines = report.lines_of([short, long, short])
    assert lines[0] == ["long", "128x128x64", "1", "3000.0", "3.00", "bytes", "33 %", "0 %", "128", "98304", "2"]
    assert lines[1][:5] == ["the others", "", "2", "", "0.00"]
    text = f"before\n{report.BEGIN}old{report.END}\nafter\n"
    done = report.written(text, [report.as_markdown("A step", lines)])
    assert "old" not in done
    assert done.startswith("before\n")
    assert report.written(done, [report.as_markdown("A step", lines)]) == done
    with pytest.raises(ValueError, match="no place for the tables"):
        report.written("nothing", [])


def test_the_document_holds_a_table_of_every_case():
    held = (report.DOCUMENT).read_text()
    for case in report.CASES:
        assert f"{case.title}, batch {case.batch}, {case.patches + 1} tokens:" in held
