"""The command `smi`. Errors are one sentence on stderr: exit code 2 for what was asked, 1 for what failed, 130 after Ctrl-C."""

import sys

import click

from ..errors import InputError, RunError, RunInterrupted
from ..kernels.versions import BackendUnavailable, backend
from . import cost, demo, distill, evaluate, export, info, invert, models, quantize, report, show, verify, verify_run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--traceback", is_flag=True, help="Show where an unexpected error came from.")
def smi(traceback) -> None:
    """Data-free inversion of Vision Transformers: dense, sparse (SMI) and patch rebirth (PRI)."""


for verb in (invert, show, report, export, distill, evaluate, quantize, cost, info, models, verify, verify_run, demo):
    smi.add_command(verb.command)


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        backend()  # a wrong SMI_BACKEND is said before anything is made
        smi.main(arguments or ["--help"], prog_name="smi", standalone_mode=False)
        return 0
    except RunInterrupted as error:
        return _fail(str(error), 130)
    except click.ClickException as error:
        return _fail(" ".join(error.format_message().split()), 2)
    except (InputError, BackendUnavailable) as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", 130)
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 1)
    except Exception as error:  # a fault of ours or of a library: still one sentence, and how to see the rest
        if "--traceback" in arguments:
            raise
        return _fail(f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]} (smi --traceback ... shows where)", 1)


def _fail(message: str, code: int) -> int:
    print(f"smi: {message}", file=sys.stderr)
    return code
