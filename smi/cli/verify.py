"""`smi verify`."""

import json

import click
import torch

from ..console import print_table
from ..errors import InputError
from ..kernels import dispatch
from .options import AS_JSON, options


@click.command("verify")
@options(click.option("--device", default="cuda", help="The GPU to check."), AS_JSON)
def command(device, as_json) -> None:
    """Check every GPU version of every kernel on this GPU against the reference, time it, and keep the verdicts."""
    if not torch.cuda.is_available() or torch.device(device).type != "cuda":
        raise InputError(f"verify needs a CUDA GPU, '{device}' is none here: on the CPU the tests check every kernel")
    verdicts = [verdict._asdict() for verdict in dispatch.verify(device)]
    print(json.dumps(verdicts)) if as_json else print_verdicts(verdicts)


def print_verdicts(verdicts: list[dict]) -> None:
    columns = ("operation", "version", "dtype", "sizes", "correct", "speed over stock PyTorch", "note")
    rows = [
        (row["operation"], row["version"], row["dtype"], row["size"], "yes" if row["correct"] else "NO", f"{row['speedup']:.2f}x", row["note"])
        for row in verdicts
    ]
    print_table("kernel versions on this GPU", columns, rows, wrap=True)
