"""`smi verify`."""

import json
import sys

import click
import torch

from ..errors import InputError
from ..kernels import dispatch
from ..kernels.versions import OPERATIONS
from .info import print_verdicts
from .options import AS_JSON, options


@click.command("verify")
@options(
    click.option("--device", default="cuda", help="The GPU to check."),
    click.option("--only", multiple=True, metavar="OPERATION", type=click.Choice(OPERATIONS), help="This operation; may be repeated."),
    AS_JSON,
)
def command(device, only, as_json) -> None:
    """Check every GPU version of every kernel on this GPU against the reference, time it, and keep the verdicts.

    Every raw function, dtype and class of sizes, the usual ones first. Verdicts are kept as they come; each has a line on stderr.
    """
    asked = torch.device(device)
    if asked.type != "cuda" or (asked.index or 0) >= torch.cuda.device_count():
        raise InputError(f"verify needs a CUDA GPU, '{device}' is none here: on the CPU the tests check every kernel")
    found = []
    for verdict in dispatch.verify(asked, only or OPERATIONS):
        found.append(verdict)
        print(f"{verdict.key}: {verdict.outcome}, {verdict.reason}", file=sys.stderr, flush=True)
    print(json.dumps([verdict._asdict() for verdict in found])) if as_json else print_verdicts("kernel versions on this GPU", found)
