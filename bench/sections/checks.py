"""Whether every raw function that the engine calls computes what its definition says, on the arguments of a step; an operation a process."""

import math

import torch

from smi.kernels import comparison, versions
from smi.kernels.verification import DTYPES, short

from ..cases import suites
from ..measuring import raw
from .calls import Call, build_vit, record
from .setting import Setting, fast_versions, settle
from .worker import Work

DEPTH = 3  # blocks: all of a model's are alike, but for the last one


def run(work: Work) -> None:
    """work.part: the operation."""
    setting, cases = settle(work), {}
    for call, dtype in calls_of(setting, work.part):
        for version in fast_versions(work.part, setting):
            name = f"{version} {short(dtype)} {call.name}"
            while name in cases:
                name += "'"  # alike but for what a name does not say: an argument that is missing
            cases[name] = lambda call=call, version=version, dtype=dtype: [check(call, version) | {"dtype": short(dtype)}]
    work.cases(cases, setting.file, setting.about)
    taken = [row for row in work.rows if "unsupported" not in row]
    work.wrong += [f"{row['version']} {row['call']}" for row in taken if not (row["correct"] and row["repeats"])]
    work.found.insert(0, f"{work.part} {len(taken) - len(work.wrong)} of {len(taken)} right")


def calls_of(setting: Setting, operation: str) -> list[tuple[Call, torch.dtype]]:
    """The calls of an operation in the key steps, in bfloat16; then those of a few images in the other dtypes."""
    sizes, found = setting.sizes, []
    steps = [(suites.BASE, sizes.batch, None, torch.bfloat16), (suites.BASE, sizes.batch, sizes.few, torch.bfloat16)]
    steps += [(suites.TINY, sizes.batch, sizes.few, torch.bfloat16), (suites.BASE, sizes.trajectories, sizes.few, torch.bfloat16)]
    steps += [(suites.TINY, min(8, sizes.batch), sizes.few, dtype) for dtype in DTYPES if dtype != torch.bfloat16]
    for model, batch, active, dtype in steps[-3:] if setting.rehearsal else steps:
        vit = build_vit(model, setting.device, torch.float32, depth=DEPTH)
        calls = record(vit, batch, active or vit.num_patches, dtype)
        found += [(call, dtype) for call in calls if call.operation == operation]
    return found


def check(call: Call, version: str) -> dict:
    """A row: errors of all results against what is allowed, and whether a second run gives the same bits."""
    about = {"kind": "check", "operation": call.operation, "function": call.function, "version": version, "call": call.name}
    with versions.forced(version):
        reason = versions.why_not(call.operation, version, call.function, call.args) or versions.ensure_built(call.operation, version)
    if reason:
        return about | {"unsupported": reason}
    truth, plain = raw.truth_and_plain(call.operation, call.function, call.args, call.written)
    outs = []
    for _ in range(2):
        poison(plain)
        outs.append(raw.results(call.operation, call.function, version, call.args, call.written))
    errors = [comparison.error_of(f"out{i}", o, p, t) for i, (o, p, t) in enumerate(zip(outs[0], plain, truth, strict=True)) if o.numel()]
    shapes = all(o.shape == p.shape for o, p in zip(outs[0], plain, strict=True))
    repeats = all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    found = [[e.name, e.error if math.isfinite(e.error) else None, e.allowed] for e in errors]
    return about | {"correct": shapes and all(e.passes for e in errors), "repeats": repeats, "errors": found}


def poison(like: tuple[torch.Tensor, ...]) -> None:
    """Leave NaN in memory that the allocator gives next to tensors of these sizes: what a kernel does not write shows."""
    held = [torch.full_like(t, torch.nan) for t in like if t.is_floating_point()]
    del held
