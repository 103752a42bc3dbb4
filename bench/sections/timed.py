"""Timed sections: the same cases as `bench.run` and `bench.operations` measure, the engine's calls one by one, profiles of a step."""

import gzip
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from smi.kernels import timing, versions
from smi.kernels.verdicts import on_device

from ..cases import suites
from ..cases.operations import Case, cases
from ..measuring import operations as measured_operations
from ..measuring.inversions import measure_step, measure_whole
from ..measuring.memory import measure_memory
from ..measuring.verdicts import chosen
from ..sides.make import build_model, make_step
from . import outputs
from .calls import Call, build_vit, record
from .setting import Setting, ceilings, fast_versions, settle, step_cases
from .worker import Work

CALLS, SAMPLES = 10, 10  # replays between two events, and how often
STEP_SECONDS = 12.0  # of a case, its rounds in turn
PROFILED = 3  # steps
KERNELS = 40  # of a profile's rows
LENGTHS = (29, 47, 99, 148, 197, 577)  # tokens of the attention cases


def steps(work: Work) -> None:
    """The key steps, ours beside eager."""
    time_steps(work, step_cases(settled := settle(work)), settled)


def compiled(work: Work) -> None:
    """The key steps, ours beside `compiled`: torch.compile takes most of the time."""
    time_steps(work, step_cases(settled := settle(work), ("ours", "compiled")), settled)


def more_steps(work: Work) -> None:
    """The other steps of the suite."""
    setting = settle(work)
    key = step_cases(setting)
    time_steps(work, {case.name: case for case in suites.on_gpu().steps if case.name not in key}, setting)


def time_steps(work: Work, some: dict[str, suites.StepCase], setting: Setting) -> None:
    peaks = ceilings(work, setting)
    named = {
        name: lambda case=case: [{"suite": "steps"} | row for row in measure_step(case, setting.device, STEP_SECONDS, peaks)]
        for name, case in some.items()
    }
    work.cases(named, setting.file, setting.about)
    for row in work.rows:
        over = [f"{row[key][1]:.1f}x {key.removeprefix('over_')}" for key in row if key.startswith("over_") and row["side"] == "ours"]
        if "ms" in row:
            work.found.append(f"{row['case']} {row['side']} {row['ms'][1]:.2f} ms {' '.join(over)}".strip())
        else:
            work.found.append(f"{row['case']} {row['side']} not timed: {row['not_timed'][:80]}")


def whole(work: Work) -> None:
    """126 DeiT-Base images by PRI v=7, all iterations."""
    setting = settle(work)
    sizes, peaks = setting.sizes, ceilings(work, setting)
    case = suites.WholeCase(suites.BASE, "pri", sizes.division, sizes.trajectories, sizes.images, (sizes.iterations,), ("ours",))
    work.cases({case.name: lambda: measure_whole(case, setting.device, work.left(), peaks)}, setting.file, setting.about | {"suite": "whole"})
    work.found += [f"{row['images']} images in {row['seconds'][1]:.1f} s" for row in work.rows]


def more_whole(work: Work) -> None:
    """Whole runs of the other methods, extrapolated."""
    setting = settle(work)
    peaks = ceilings(work, setting)
    named = {case.name: lambda case=case: measure_whole(case, setting.device, STEP_SECONDS, peaks) for case in suites.whole_on_gpu()[1:]}
    work.cases(named, setting.file, setting.about | {"suite": "whole"})


def memory(work: Work) -> None:
    """Saved activations and peaks, all sides of all cases in this process."""
    setting = settle(work)
    named = {case.name: lambda case=case: measure_memory(case, setting.device) for case in suites.on_gpu().memory}
    work.cases(named, setting.file, setting.about | {"suite": "memory"})


# ---- operations


def operation_rows(case: Case, work: Work, setting: Setting, compile_it: bool = False) -> list[dict]:
    peak = ceilings(work, setting)["bfloat16"]
    measured, refused = measured_operations.measure(case, setting.device, peak, SAMPLES, compile_it)
    known = on_device(case.operation, setting.device) if setting.device.type == "cuda" else []
    return measured_operations.case_rows(case, measured, refused, chosen(case, known))


def operations(work: Work) -> None:
    """Every case of every operation, or of those named on the command line, beside stock PyTorch and plain code."""
    setting = settle(work)
    named = {case.name: lambda case=case: operation_rows(case, work, setting) for case in cases(setting.sizes.batch, work.options.get("operations"))}
    work.cases(named, setting.file, setting.about)


def compiled_operations(work: Work) -> None:
    """A case of every operation beside torch.compile."""
    setting = settle(work)
    first = {case.operation: case for case in reversed(cases(setting.sizes.batch, work.options.get("operations")))}
    named = {case.name: lambda case=case: operation_rows(case, work, setting, True) for case in first.values()}
    work.cases(named, setting.file, setting.about)


def attention(work: Work) -> None:
    """Attention of six lengths, forward and backward, beside every backend of SDPA."""
    setting = settle(work)
    lengths = LENGTHS[:2] if setting.rehearsal else LENGTHS
    some = [case for case in cases(setting.sizes.batch, ["attention"]) if int(case.shape.split("x")[1].split()[0]) in lengths]
    work.cases({case.name: lambda case=case: operation_rows(case, work, setting) for case in some}, setting.file, setting.about)
    for case in some:
        warm = {row["side"]: row["warm_us"][1] for row in work.rows if row["case"] == case.shape and "warm_us" in row}
        ours, sdpa = (min((warm[s] for s in warm if s.startswith(kind)), default=0.0) for kind in (("cuda", "triton"), "sdpa"))
        if ours and sdpa:
            work.found.append(f"{case.shape} {sdpa / ours:.2f}x SDPA")


# ---- the engine's calls


def calls(work: Work) -> None:
    """Every call of a step, in all versions; where it is a GEMM, beside that GEMM alone by cuBLAS."""
    setting = settle(work)
    named = {}
    vit = build_vit(suites.BASE, setting.device, torch.float32, depth=3)
    for active in (vit.num_patches, setting.sizes.few):
        found = record(vit, setting.sizes.batch, active)
        for call in found:
            name = call.name
            while name in named:
                name += "'"
            named[name] = lambda call=call: [time_call(call, setting)]
    work.cases(named, setting.file, setting.about)
    slower = [row for row in work.rows if "cublas" in row["us"] and (own := best(row)) and own > 1.3 * row["us"]["cublas"][1]]
    work.found.append(f"{len(work.rows)} calls; over 1.3 times cuBLAS: {len(slower)}")


def best(row: dict) -> float | None:
    """Median microseconds of the fastest of our versions."""
    return min((us[1] for version, us in row["us"].items() if version in versions.NEEDS_VERDICT), default=None)


def time_call(call: Call, setting: Setting) -> dict:
    """Microseconds of a call by version: 20, 50 and 80 % quantiles."""
    runs, refused = {}, {}
    for version in dict.fromkeys(("stock", *fast_versions(call.operation, setting))):
        with versions.forced(version):
            reason = versions.why_not(call.operation, version, call.function, call.args) or versions.ensure_built(call.operation, version)
        if reason:
            refused[version] = reason
            continue
        function, args = getattr(versions.load(call.operation, version), call.function), call.fresh()
        try:
            runs[version] = timing.captured(lambda function=function, args=args: function(*args), setting.device)
        except Exception as error:  # the other versions are still timed
            refused[version] = f"{type(error).__name__}: {error}"[:200]
    if (gemm := plain_gemm(call)) is not None:
        runs["cublas"] = timing.captured(gemm, setting.device)
    samples = timing.alternate(runs, setting.device, SAMPLES, calls=dict.fromkeys(runs, CALLS))
    us = {version: [q * 1e6 for q in timing.quantiles(values)] for version, values in samples.items()}
    return {"kind": "call", "operation": call.operation, "function": call.function, "call": call.name, "us": us, "refused": refused}


def plain_gemm(call: Call):
    """The GEMM alone of a call that multiplies x [..., k] by a weight, into memory that is there; None for the others."""
    if not call.operation.startswith("linear_"):
        return None
    x, weight = call.args[0], next(a for a in call.args[1:] if isinstance(a, torch.Tensor) and a.ndim == 2)
    x, weight = x.flatten(0, -2), weight if "backward" in call.function else weight.t()
    out = x.new_empty(len(x), weight.shape[1])
    return lambda: torch.mm(x, weight, out=out)


# ---- profiles


def profiles(work: Work) -> None:
    """Kernels of a step of DeiT-Base, with all patches and few: time, calls; and a trace for a viewer."""
    setting = settle(work)
    some = [case for case in step_cases(setting).values() if case.model == suites.BASE]
    named = {case.name: lambda case=case: [profile_step(case, work.folder, setting)] for case in some}
    work.cases(named, setting.file, setting.about)
    work.found += [f"{row['case']} {row['us_of_a_step'] / 1000:.2f} ms in {row['kernels_of_a_step']} kernels" for row in work.rows]


def profile_step(case: suites.StepCase, folder: Path, setting: Setting) -> dict:
    step = make_step("ours", build_model(case.model, dict(case.options), setting.device), case.batch, case.active)
    step()
    setting.synchronize()
    gpu = setting.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            step()
        setting.synchronize()
    events = profiler.key_averages()
    times = sorted(((e.self_device_time_total if gpu else e.self_cpu_time_total, e.count, e.key) for e in events), reverse=True)
    kernels = [{"kernel": key[:120], "us": us / PROFILED, "calls": count / PROFILED} for us, count, key in times[:KERNELS] if us > 0]
    total, count = sum(us for us, _, _ in times) / PROFILED, sum(count for us, count, _ in times if us > 0) / PROFILED
    trace = f"trace-{'all' if case.active is None else case.active}.json.gz"
    with tempfile.TemporaryDirectory() as temporary:
        profiler.export_chrome_trace(str(Path(temporary) / "trace.json"))
        kept = outputs.write_bytes(folder / trace, gzip.compress((Path(temporary) / "trace.json").read_bytes()))
    about = {"kind": "profile", "case": case.name, "resolved": step.resolved, "us_of_a_step": total, "kernels_of_a_step": round(count)}
    return about | {"kernels": kernels, "trace": trace if kept else None}
