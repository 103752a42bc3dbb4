"""`smi info`."""

import json

import click

from ..console import make_console, print_table
from ..environment import info_table
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
        print(f"{device['device']}: {device['name']} ({size}, {device['capability']})")
    rows = [(row["operation"], row["version"], "yes" if row["available"] else "no", row["reason"]) for row in found["kernels"]]
    print_table(f"kernels (SMI_BACKEND={found['backend']})", ("operation", "version", "available", "where, or why not"), rows, wrap=True)
