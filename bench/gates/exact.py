"""Exact numbers: FLOPs, and bytes of saved activations, held against bench/baseline/exact.json."""

import json
from pathlib import Path

import timm
import torch

from smi import cost
from smi.console import print_table
from smi.files import write_json
from smi.inversion.schedules import make_schedule
from smi.models.vit import describe

from ..cases.suites import BASE, ITERATIONS, METHODS, TINY, final_smi
from ..measuring.record import origin
from ..sides import eager, ours
from ..sides.make import build_model


def exact_flops() -> dict[str, int | float]:
    """Counts of smi/cost.py on a fixed list of cases; no weights are made."""
    found: dict[str, int | float] = {}
    for name in (TINY, BASE):
        with torch.device("meta"):
            vit = describe(timm.create_model(name))
        short = name.removesuffix("_patch16_224")
        for active in (vit.num_patches, final_smi()):
            found[f"{short} step, {active} patches"] = cost.step_flops(vit, active)
            found[f"{short} step, {active} patches, CLS-only last block"] = cost.step_flops(vit, active, cls_only=True)
        for method, options in METHODS:
            schedule = make_schedule(method, vit.num_patches, ITERATIONS, **options)
            title = " ".join([method, *(f"v={v}" for v in options.values())])
            found[f"{short} {title}, whole trajectory"] = cost.trajectory_flops(vit, schedule, cls_only=True)
            found[f"{short} {title}, GFLOP by the published rule"] = round(cost.published_gflops(vit, schedule), 2)
    return found


def exact_kept_bytes() -> dict[str, int]:
    """Bytes of the activations that one forward pass saves: eager, and each engine in both dtypes, by what it runs in on this machine."""
    found = {}
    model = build_model(TINY, {"depth": 2}, torch.device("cpu"))
    engines = dict.fromkeys(("reference", ours.ENGINE))
    for active in (None, final_smi()):
        count = describe(model).num_patches if active is None else active
        where = f"deit_tiny of 2 blocks, batch 2, {count} patches"
        found[f"eager, {where}"] = eager.make_step(model, 2, count).kept_bytes()
        for engine in engines:
            for dtype in ("float32", "bfloat16"):
                step = ours.make_step(model, 2, count, engine=engine, dtype=dtype)
                found[f"{step.resolved}, {where}"] = step.kept_bytes()
    return found


def check_exact(path: Path, update: bool) -> int:
    """Hold FLOPs and bytes of saved activations against the file; how many differ."""
    now = {"flops": exact_flops(), "kept_bytes": exact_kept_bytes()}
    before = json.loads(path.read_text()) if path.exists() else {}
    if update:
        write_json(path, origin() | now)
        print(f"wrote {path}")
        return 0
    changed = differences(now, before)
    if changed:
        print_table("exact numbers that are not as committed", ["what", "committed", "now"], changed)
        print("if this is meant, run python -m bench.check --update and commit the file")
    else:
        print(f"exact: {sum(map(len, now.values()))} numbers are as in {path.name}")
    return len(changed)


def differences(now: dict[str, dict], before: dict) -> list[tuple[str, object, object]]:
    """(what, committed, now) of every number that changed, came or went.

    Bytes of the fused engine in versions that only one of the two machines can run are named, but are no difference.
    """
    found = []
    for kind, numbers in now.items():
        committed = before.get(kind, {})
        for name in sorted(numbers.keys() | committed.keys()):
            if kind == "kept_bytes" and committed and (name in numbers) != (name in committed) and "fused" in name:
                print(f"kept_bytes: {name}: only {'here' if name in numbers else 'in the committed file'}, not compared")
            elif numbers.get(name) != committed.get(name):
                found.append((f"{kind}: {name}", committed.get(name, "-"), numbers.get(name, "-")))
    return found
