"""What can go wrong; the command line turns each into one sentence and an exit code: 2, 1 and 130."""

LONGEST = 1000  # characters of a message


class InputError(ValueError):
    """What the user asked for cannot be done; the message, one line, says what was wrong and what would be right."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class RunError(RuntimeError):
    """The run itself failed (diverged, ran out of memory, could not write); the message, one line, says where and what was kept."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


def one_line(message: object) -> str:
    """A message on one line, its middle left out where it is long: values and other libraries' messages in it may have any length."""
    line = " ".join(part.strip() for part in str(message).splitlines())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[5 - LONGEST // 2 :]}"


class RunInterrupted(Exception):
    """Ctrl-C in the middle of a run; the message says what was kept."""
