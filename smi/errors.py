"""What can go wrong; the command line turns each into one sentence and an exit code: 2, 1 and 130."""


class InputError(ValueError):
    """What the user asked for cannot be done; the message says what was wrong and what would be right."""


class RunError(RuntimeError):
    """The run itself failed (diverged, ran out of memory, could not write); the message says where and what was kept."""


class RunInterrupted(Exception):
    """Ctrl-C in the middle of a run; the message says what was kept."""
