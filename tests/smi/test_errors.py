"""What is wrong is said in one line, whatever it is about."""

import pytest

from smi.errors import LONGEST, InputError, RunError, one_line

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("kind", [InputError, RunError])
def test_a_message_is_one_line_of_bounded_length(kind):
    """Values and other libraries' messages in it may have any: a file name of a million letters, PyTorch's paragraphs."""
    assert str(kind("a  b")) == "a  b"
    assert str(kind("Error:\n\tfirst\r\n  second\u2028third")) == "Error: first second third"
    long = str(kind("begin " + "x" * 10**6 + " end"))
    assert len(long) == LONGEST
    assert long.startswith("begin x")
    assert long.endswith("x end")
    assert one_line("x" * LONGEST) == "x" * LONGEST
    assert str(kind()) == ""
