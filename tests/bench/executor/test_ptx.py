"""The model of PTX on small programs: results, and what it reports when one instruction is missing."""

import numpy as np
import pytest

from bench.executor.ptx import fragments
from bench.executor.ptx.launch import launch, load
from bench.executor.ptx.program import Fault, names, parse

pytestmark = pytest.mark.fast

REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b64 %rd<9>;"


def text(body: str, threads: int = 64, name: str = "k") -> str:
    """A kernel with one pointer in %rd1, the thread in %r1, its place of four bytes in %rd2, and dynamic shared memory."""
    head = f".visible .entry {name}(\n\t.param .u64 .ptr .global .align 1 {name}_param_0\n)\n.reqntid {threads}\n{{\n"
    start = f"ld.param.b64 %rd1, [{name}_param_0]; mov.u32 %r1, %tid.x; mad.wide.u32 %rd2, %r1, 4, %rd1;"
    return f".extern .shared .align 16 .b8 global_smem[];\n{head}{REGISTERS}\n{start}\n{body}\nret;\n}}\n"


def run(body: str, array: np.ndarray, threads: int = 64, shared: int = 4096) -> tuple[np.ndarray, list[str]]:
    """The array afterwards, and what was reported."""
    (after,), memory = launch(load(text(body, threads)), (1,), [array], shared)
    return after, memory.reports


NUMBERS = np.array([7, -7, 0, 1, -1, 2**31 - 1, -(2**31), 12345678] * 8, np.int32)
UNSIGNED = NUMBERS.view(np.uint32)
WIDE = NUMBERS.astype(np.int64)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.s32 %r3, %r2, 5;", NUMBERS + 5),
        ("mul.hi.s32 %r3, %r2, 1431655766;", (WIDE * 1431655766 >> 32).astype(np.int32)),
        ("mul.hi.u32 %r3, %r2, -2;", (UNSIGNED.astype(np.uint64) * (2**32 - 2) >> 32).astype(np.uint32).view(np.int32)),
        ("div.s32 %r3, %r2, 4;", np.trunc(WIDE / 4).astype(np.int32)),
        ("rem.s32 %r3, %r2, 4;", np.fmod(NUMBERS, 4)),
        ("div.u32 %r3, %r2, 3;", (UNSIGNED // 3).view(np.int32)),
        ("shr.s32 %r3, %r2, 40;", np.where(NUMBERS < 0, -1, 0)),
        ("shl.b32 %r3, %r2, 32;", NUMBERS * 0),
        ("shf.l.wrap.b32 %r3, %r2, %r2, 8;", (UNSIGNED << 8 | UNSIGNED >> 24).view(np.int32)),
        ("bfe.s32 %r3, %r2, 4, 8;", ((NUMBERS >> 4 & 255) ^ 128) - 128),
        ("prmt.b32 %r3, %r2, 0, 0x0123;", UNSIGNED.byteswap().view(np.int32)),
        ("setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 3, 4, %p1;", np.where(NUMBERS < 0, 3, 4)),
        ("setp.lt.u32 %p1, %r2, 8; selp.b32 %r3, 3, 4, %p1;", np.where(UNSIGNED < 8, 3, 4)),
        ("not.b32 %r3, %r2;", ~NUMBERS),
        ("mov.b32 {%h1, %h2}, %r2; mov.b32 %r3, {%h2, %h1};", (UNSIGNED << 16 | UNSIGNED >> 16).view(np.int32)),
        ("cvt.rn.f32.s32 %r4, %r2; cvt.rzi.s32.f32 %r3, %r4;", np.clip(np.trunc(NUMBERS.astype(np.float32)).astype(np.float64), -(2**31), 2**31 - 1)),
        ("shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;", NUMBERS.reshape(-1, 2)[:, ::-1].reshape(-1)),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_instructions_on_integers(code, expected):
    after, reports = run(f"ld.global.b32 %r2, [%rd2]; {code} st.global.b32 [%rd2], %r3;", NUMBERS)
    assert not reports
    np.testing.assert_array_equal(after, expected.astype(np.int32))


FLOATS = np.array([0.1, -2.5, 3e-39, np.inf, 65519.0, 1.00390625, -0.0, 7.0] * 8, np.float32)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("fma.rn.f32 %r3, %r2, %r2, 0f3F800000;", (FLOATS.astype(np.float64) ** 2 + 1).astype(np.float32)),
        ("add.ftz.f32 %r3, %r2, 0f00000000;", np.where(np.abs(FLOATS) < 1e-38, 0, FLOATS)),
        ("cvt.rn.bf16.f32 %h1, %r2; cvt.f32.bf16 %r3, %h1;", fragments.from_bf16(fragments.round_bf16(FLOATS))),
        ("cvt.rn.f16.f32 %h1, %r2; cvt.f32.f16 %r3, %h1;", FLOATS.astype(np.float16).astype(np.float32)),
        ("neg.f32 %r4, %r2; max.f32 %r3, %r2, %r4;", np.abs(FLOATS)),
        ("setp.gtu.f32 %p1, %r2, 0f7FC00000; selp.f32 %r3, 0f3F800000, %r2, %p1;", np.ones(64)),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_instructions_on_floats(code, expected):
    with np.errstate(all="ignore"):
        after, reports = run(f"ld.global.b32 %r2, [%rd2]; {code} st.global.b32 [%rd2], %r3;", FLOATS)
        assert not reports
        finite = np.isfinite(FLOATS)
        np.testing.assert_array_equal(after[finite], expected.astype(np.float32)[finite])


def test_rounding_to_bf16_is_to_even():
    assert fragments.from_bf16(fragments.round_bf16(np.float32([1.00390625, 1.01171875]))).tolist() == [1.0, 1.015625]


def test_threads_leave_a_loop_one_by_one():
    body = "mov.b32 %r2, 0;\n$L1:\nadd.s32 %r2, %r2, 2;\nsetp.lt.s32 %p1, %r2, %r1;\n@%p1 bra $L1;\nst.global.b32 [%rd2], %r2;"
    after, _ = run(body, np.zeros(64, np.int32))
    np.testing.assert_array_equal(after, np.maximum(2, -(-np.arange(64) // 2) * 2))


EXCHANGE = """
mov.b32 %r9, global_smem; shl.b32 %r3, %r1, 2; add.s32 %r4, %r9, %r3; xor.b32 %r5, %r3, 128; add.s32 %r5, %r9, %r5;
st.shared.b32 [%r4], %r1;
bar.sync 0;
ld.shared.b32 %r6, [%r5];
st.global.b32 [%rd2], %r6;
"""


def test_a_missing_barrier_is_a_race():
    after, reports = run(EXCHANGE, np.zeros(64, np.int32))
    assert not reports
    np.testing.assert_array_equal(after, np.arange(64) ^ 32)
    _, reports = run(EXCHANGE.replace("bar.sync 0;", ""), np.zeros(64, np.int32))
    assert "race: reads what another warp wrote since the barrier" in reports[0]
    _, reports = run(EXCHANGE + "st.shared.b32 [%r4], 7;", np.zeros(64, np.int32))
    assert "race: writes what another warp read since the barrier" in reports[0]


COPY = """
mov.b32 %r9, global_smem; shl.b32 %r3, %r1, 2; add.s32 %r4, %r9, %r3;
cp.async.ca.shared.global [%r4 + 0], [%rd2 + 0], 0x4;
cp.async.commit_group;
cp.async.wait_group 0;
ld.shared.b32 %r6, [%r4];
st.global.b32 [%rd2], %r6;
"""


def test_a_copy_is_there_after_its_wait_only():
    assert run(COPY, FLOATS)[0].tolist() == FLOATS.tolist()
    assert np.isnan(run(COPY.replace("wait_group 0", "wait_group 1"), FLOATS)[0]).all()
    assert np.isnan(run(COPY.replace("cp.async.wait_group 0;", ""), FLOATS)[0]).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r2, [%rd1+256];", "is in no buffer or not aligned"),
        ("ld.global.b32 %r2, [%rd1+2];", "is in no buffer or not aligned"),
        ("mov.b32 %r9, global_smem; ld.shared.b32 %r2, [%r9+4096];", "4096 bytes are there"),
        ("setp.lt.s32 %p1, %r1, 7; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r9];", "not by whole groups of 32 threads"),
    ],
)
def test_what_no_program_may_do_is_a_fault(body, message):
    with pytest.raises(Fault, match=message):
        run(body, FLOATS)


@pytest.mark.parametrize("body", ["mbarrier.init.shared::cta.b64 [%r1], 1;", "add.sat.s32 %r2, %r1, 1;", "bar.sync 1, 32;"])
def test_what_is_not_modelled_is_refused(body):
    with pytest.raises(NotImplementedError, match="not modelled: line"):
        load(text(body))


def test_a_kernel_is_found_by_its_name():
    both = text("", name="a") + text("add.s32 %r2, %r1, 1;", name="b")
    assert names(both) == ["a", "b"]
    assert len(parse(both, "b").instructions()) == len(parse(both).instructions()) + 1
    with pytest.raises(ValueError, match="has no kernel c; its kernels are a, b"):
        parse(both, "c")


def test_mma_multiplies_what_ldmatrix_loads():
    """A [16, 16] by rows and B [16, 8] by columns, through shared memory, float16."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)
    body = """
    mov.b32 %r9, global_smem; mul.lo.s32 %r3, %r1, 32; add.s32 %r4, %r9, %r3; cvt.u64.u32 %rd3, %r3; add.s64 %rd4, %rd1, %rd3;
    setp.lt.s32 %p1, %r1, 24;
    @%p1 ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd4]; @%p1 ld.global.v4.b32 {%r14, %r15, %r16, %r17}, [%rd4+16];
    @%p1 st.shared.v4.b32 [%r4], {%r10, %r11, %r12, %r13}; @%p1 st.shared.v4.b32 [%r4+16], {%r14, %r15, %r16, %r17};
    bar.sync 0;
    and.b32 %r5, %r1, 15; shl.b32 %r5, %r5, 5; and.b32 %r6, %r1, 16; add.s32 %r5, %r5, %r6; add.s32 %r5, %r9, %r5;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r5];
    and.b32 %r7, %r1, 7; shl.b32 %r7, %r7, 5; and.b32 %r8, %r1, 8; shl.b32 %r8, %r8, 1; add.s32 %r7, %r7, %r8; add.s32 %r7, %r9, %r7;
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r24, %r25}, [%r7+512];
    mov.b32 %r30, 0; mov.b32 %r31, 0; mov.b32 %r32, 0; mov.b32 %r33, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r30, %r31, %r32, %r33}, {%r20, %r21, %r22, %r23}, {%r24, %r25}, {%r30, %r31, %r32, %r33};
    shl.b32 %r2, %r1, 4; cvt.u64.u32 %rd5, %r2; add.s64 %rd6, %rd1, %rd5;
    st.global.v4.b32 [%rd6+1024], {%r30, %r31, %r32, %r33};
    """
    given = np.concatenate([a.view(np.uint8).reshape(-1), b.T.copy().view(np.uint8).reshape(-1), np.zeros(256, np.uint8), np.zeros(512, np.uint8)])
    after, reports = run(body, given, threads=32)
    assert not reports
    found = fragments.c_tile(after[1024:].view(np.float32).reshape(32, 4))[0]
    np.testing.assert_allclose(found, a.astype(np.float64) @ b.astype(np.float64), rtol=1e-6, atol=1e-6)


STORE_B = "ld.global.b16 %h1, [%rd3]; st.shared.b16 [%r4], %h1;"
COPY_B = "setp.lt.s32 %p2, %r1, 16; @%p2 cp.async.cg.shared.global [%r5], [%rd4], 16; cp.async.commit_group; cp.async.wait_group 0;"
WGMMA = """
mov.b32 %r9, global_smem; shl.b32 %r3, %r1, 1; add.s32 %r4, %r9, %r3; cvt.u64.u32 %rd3, %r3; add.s64 %rd3, %rd1, %rd3;
shl.b32 %r5, %r1, 4; cvt.u64.u32 %rd4, %r5; add.s64 %rd4, %rd1, %rd4; add.s32 %r5, %r9, %r5;
BRING
fence.proxy.async.shared::cta;
bar.sync 0;
mov.b32 %r10, 1065369472; mov.b32 %r11, %r10; mov.b32 %r12, %r10; mov.b32 %r13, %r10;
mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0; mov.b64 %rd5, 34360262720; setp.eq.s32 %p1, 0, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, %rd5, %p1, 1, 1, 0;
wgmma.commit_group.sync.aligned;
BEFORE
wgmma.wait_group.sync.aligned 0;
mul.lo.s32 %r6, %r1, 16; cvt.u64.u32 %rd6, %r6; add.s64 %rd6, %rd1, %rd6;
st.global.v4.b32 [%rd6+256], {%r20, %r21, %r22, %r23};
"""  # A is ones [64, 16]; B [16, 8], eight rows of k behind each other: descriptor start 64, leading 8, stride 8, in units of 16 bytes


def multiply(bring: str, before: str = "", without: str = "-") -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(found, right, reports) of ones times B."""
    b = fragments.round_bf16(np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32))
    laid = b.reshape(2, 8, 8).transpose(0, 2, 1)  # k halves, n, k
    given = np.concatenate([np.ascontiguousarray(laid).view(np.uint8).reshape(-1), np.zeros(2048, np.uint8)])
    body = WGMMA.replace("BRING", bring).replace("BEFORE", before).replace(without, "")
    after, reports = run(body, given, threads=128)
    found = fragments.wide_tile(after[256:].view(np.float32).reshape(128, 4))[0]
    return found, np.ones((64, 16)) @ fragments.from_bf16(b).astype(np.float64), reports


@pytest.mark.parametrize("bring", [STORE_B, COPY_B], ids=["stored", "copied"])
def test_wgmma_multiplies(bring):
    found, right, reports = multiply(bring)
    assert not reports
    np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("bring", "before", "without", "report"),
    [
        (STORE_B, "", "fence.proxy.async.shared::cta;", "fence: a store is read by wgmma without a proxy fence"),
        (COPY_B, "", "fence.proxy.async.shared::cta;", "fence: a cp.async is read by wgmma without a proxy fence"),
        (STORE_B, "", "bar.sync 0;", "race: reads what a warp wrote since the barrier"),
        (STORE_B, "mov.b32 %r12, 0;", "-", "register: %r12 is assigned while a wgmma in flight reads it"),
        (STORE_B, "st.shared.b16 [%r4], 0;", "-", "race: an operand of wgmma changed before the wait"),
    ],
    ids=["store without fence", "copy without fence", "no barrier", "register reused", "operand overwritten"],
)
def test_what_wgmma_does_not_bear_is_reported(bring, before, without, report):
    assert any(report in line for line in multiply(bring, before, without)[2])


def test_accumulators_are_poison_before_the_wait():
    assert np.isnan(multiply(STORE_B, without="wgmma.wait_group.sync.aligned 0;")[0]).all()
