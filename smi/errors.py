"""What can go wrong, in two kinds: the command line turns them into one sentence and exit code 2 or 1."""


class InputError(ValueError):
    """What the user asked for cannot be done; the message says what was wrong and what would be right."""


class RunError(RuntimeError):
    """The run itself failed (diverged, ran out of memory, could not write); the message says where and what was kept."""
