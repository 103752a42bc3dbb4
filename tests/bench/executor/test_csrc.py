"""csrc's attention from nvcc's PTX, executed for sm_80. What the launch chooses is tested in tests/kernels/test_csrc.py."""

import pytest

from bench.executor import csrc, run
from bench.gates import nvcc


@pytest.mark.slow
@pytest.mark.skipif(not nvcc.found(), reason="nvcc is not found: csrc cannot be compiled")
def test_a_width_from_ptx():
    """Each kernel of one width: in bf16, plain and with an index and lengths, and in float16."""
    texts = {32: csrc.compile_to_ptx(32)}
    outcomes = [run.execute_csrc(work, texts) for work in csrc.works((32,))]
    print(*outcomes, sep="\n")
    assert not [line for outcome in outcomes for line in outcome.wrong]
    assert len({name for outcome in outcomes for name in outcome.record.launches}) == 16
