"""`smi models`."""

import json
from collections import Counter

import click

from ..console import print_table
from ..errors import InputError
from ..models.levels import timm_levels
from .options import AS_JSON, options


@click.command("models")
@options(click.argument("filter", required=False), AS_JSON)
def command(filter, as_json) -> None:
    """At which level timm's architectures run: all, or those with FILTER in their name (or a pattern such as 'vit_*')."""
    rows = list(timm_levels(filter))
    if not rows:
        raise InputError(f"no architecture of timm has '{filter}' in its name")
    counts = dict(Counter(row.level for row in rows))
    if as_json:
        print(json.dumps({"counts": counts, "models": [row.record() for row in rows]}))
        return
    print_table("timm's architectures", ("model", "level", "why"), [(row.model, row.level, row.reason) for row in rows], wrap=True)
    print(", ".join(f"{number} {level}" for level, number in counts.items()))
