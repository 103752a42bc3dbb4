"""`smi info`."""

import json

import click

from ..console import make_console, print_table
from ..environment import info_table
from ..kernels.verdicts import Verdict
from .options import AS_JSON, options


@click.command("info")
@options(AS_JSON)
def command(as_json) -> None:
    """Versions, devices, and which version of each kernel is available and why others are not."""
    found = info_table()
    print(json.dumps(found)) if as_json else print_info(found)


def print_info(found: dict) -> None:
    make_console().print("  ".join(f"{name} {version}" for name, version in found["versions"].items()))
    for device in found["devices"]:
        size = f"{device['threads']} threads" if "threads" in device else f"{device['memory_gib']:.0f} GiB"
        print(f"{device['device']}: {device['name']} ({size}, {device['capability']}); dtype auto is {device['dtype']}")
    rows = [(row["operation"], row["version"], "yes" if row["available"] else "no", row["reason"]) for row in found["kernels"]]
    print_table(f"kernels (SMI_BACKEND={found['backend']})", ("operation", "version", "available", "where, or why not"), rows, wrap=True)
    for device, verdicts in found["verdicts"].items():
        print_verdicts(f"kernels checked on {device} (smi verify checks all)", [Verdict(**row) for row in verdicts])


def print_verdicts(title: str, verdicts: list[Verdict]) -> None:
    columns = ("operation", "function", "version", "dtype", "sizes", "outcome", "used", "speed, or why not")
    print_table(title, columns, [(*v.key, v.outcome, "yes" if v.chosen else "no", v.reason) for v in verdicts], wrap=True)
