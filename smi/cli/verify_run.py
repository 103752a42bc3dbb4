"""`smi verify-run`."""

import json

import click

from ..errors import RunError
from ..runs.verify import ASIDE, verify_run
from .options import AS_JSON, FOLDER, options


@click.command("verify-run")
@options(FOLDER, AS_JSON)
def command(folder, as_json) -> None:
    """Check every file of a run against its hash, and mend the index."""
    found = verify_run(folder)
    if as_json:
        print(json.dumps(vars(found)))
    else:
        left = "" if not found.missing else f", {found.missing} batches are still to be made"
        print(f"{folder}: {len(found.intact)} shards are intact{left}" + (f"; the index lacked {len(found.unnamed)}" if found.unnamed else ""))
    if not found.sound:
        listed = "; ".join(f"{name}: {why}" for name, why in found.damaged.items())
        raise RunError(f"{len(found.damaged)} files are damaged and now end in {ASIDE}; the same smi invert makes them again ({listed})")
