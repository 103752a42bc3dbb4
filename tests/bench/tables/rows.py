"""Small made-up rows of every kind, as the commands of bench append them."""

from bench.cases import suites
from smi.kernels.verdicts import Verdict

WHEN = "2026-01-02T03:04:05Z"
ABOUT = {"device": "X", "device_class": "cpu-avx2-2threads", "threads": 2, "torch": "2.0", "commit": "0123456789", "dirty": False}


def at(run: str = WHEN, **changes) -> dict:
    """What every row says of where and when; `run` is that of the suites."""
    return ABOUT | {"time": run, "run": run} | changes


def step(active: int = 46, ms: float = 100.0, model: str = suites.BASE, suite: str = "steps", **changes) -> list[dict]:
    """A step of all sides: eager takes four times as long, compiled twice."""
    case = suites.StepCase(model, 4, None if active == suites.PATCHES else active).name
    about = at() | {"kind": "step", "suite": suite, "case": case, "model": model, "batch": 4, "active": active, "options": {}, "depth": 12}
    about |= {"tokens": active + 1, "image_size": [224, 224], "dtype": "float32"}
    times = {"ours": ms, "eager": 4 * ms, "compiled": 2 * ms}
    rows = [about | {"side": side, "ms": [value] * 3, "share_of_products": ms / value / 2} for side, value in times.items()]
    rows[0] |= {"over_eager": [4.0] * 3, "over_compiled": [2.0] * 3}
    return [row | changes for row in rows]


def whole(method: str, ours: float, eager: float, model: str = suites.TINY) -> list[dict]:
    about = at() | {"kind": "whole", "suite": "whole", "case": f"{model}, {method}", "model": model, "method": method, "batch": 4}
    about |= {"timed_iterations": [2, 6], "rounds": 3, "dtype": "float32", "share_of_products": 0.5}
    images = {"ours": ours, "eager": eager}
    return [about | {"side": side, "images_per_second": [i] * 3, "iterations_per_second": 1e3 * i} for side, i in images.items()]


def memory() -> list[dict]:
    case = suites.MemoryCase(suites.BASE, 8).name
    about = at() | {"kind": "memory", "suite": "memory", "case": case, "model": suites.BASE, "batch": 8, "active": None}
    sizes = {"ours": 40, "recompute": 20, "eager": 100}
    return [about | {"side": side, "kept_bytes": n << 20, "peak_above_idle_bytes": 2 * n << 20} for side, n in sizes.items()]


def operation() -> list[dict]:
    about = at() | {"kind": "case", "suite": "operations", "operation": "attention", "case": "4x47 tokens", "dtype": "float32", "resolved": "cpu"}
    times = {"stock": 300.0, "cpu": 100.0, "eager": 200.0}
    rows = [about | {"side": side, "warm_us": [us] * 3, "cold_us": None, "share_of_floor": 0.25} for side, us in times.items()]
    return [*rows, about | {"side": "sdpa cudnn", "not_timed": "no backend"}]


def verdict() -> list[dict]:
    gpu = {"device": "Y", "architecture": "sm_90", "torch": "2.0", "commit": "0123456789", "dirty": False}
    found = Verdict("attention", "forward", "triton", "bfloat16", "d64 n64", "correct", 1.5, "")
    return [gpu | {"kind": "verdict"} | found._asdict()]


def evidence(data: str = "digits", weight: float = 5e-3, copy: float = 0.9) -> list[dict]:
    about = ABOUT | {"kind": "evidence", "time": WHEN, "config": {"data": data, "tv_weight": weight}}
    shares = {name: [0.5, 0.6] for name in ("agreement", "full", "w8a8", "w4a8", "w4a4", "w4a3", "small", "trunk")}
    noise = about | {"method": "gaussian", "seconds": [0.06, 0.06], "copy": [0.2, 0.4]} | shares
    return [noise, about | {"method": "smi", "seconds": [47.0, 48.0], "speedup": [3.0, 4.0], "copy": [copy, copy + 0.02]} | shares]


def imagenet() -> list[dict]:
    about = ABOUT | {"kind": "evidence", "time": WHEN, "config": {"data": "imagenet", "tv_weight": 1e-4, "iterations": 20, "images": 32}}
    shares = {name: [0.75, 0.77] for name in ("agreement", "full", "published_w8a8", "w8a8")}
    about |= {"seconds": [47.0, 48.0], "interval": dict.fromkeys(shares, 0.025), **shares}
    smi = about | {"method": "smi", "paired": {"published_w8a8": [-0.01, 0.012, 0.1], "w8a8": [0.02, 0.01, 1e-5]}}
    return [smi, about | {"method": "real"}]


def int8() -> list[dict]:
    times = {"float32_seconds": 0.02, "int8_seconds": 0.01, "speedup": 2.0, "speedup_of_smallest": 1.9}
    shares = {"accuracy_float32": 0.99, "accuracy_simulated": 0.98, "accuracy_int8": 0.97, "agreement_with_simulation": 1.0}
    row = at() | {"kind": "int8", "model": "digits", "batch": 16, "same_in_new_process": True} | times | shares
    return [row | {"threads": 1}, row | {"threads": 2}]


def agreement() -> list[dict]:
    row = ABOUT | {"kind": "agreement", "time": WHEN, "method": "pri v=4", "images": 252, "seeds": 3}
    return [row | {"side": "fused float32", "same_patches": 0.99, "loss": 0.5, "agreement": 0.9}]


def cpu_attention() -> list[dict]:
    about = ABOUT | {"kind": "cpu_attention", "time": WHEN, "tokens": 47, "width": 64, "heads": 12, "batch": 4, "dtype": "bfloat16"}
    times = {"sdpa": 8.0, "sdpa in float32": 4.0, "ours": 2.0, "kernels": 1.0, "engine": 1.6}
    return [about | {"side": s, "ms": [t] * 3, "least_ms": t / 2, "over_sdpa": 8 / t, "least_over_sdpa": 8 / t} for s, t in times.items()]


def demo() -> list[dict]:
    about = ABOUT | {"kind": "demo", "time": WHEN, "model": "digits", "images": 84, "iterations": 200, "batch_size": 12, "transfer_steps": 400}
    about |= {"engine": "fused", "dtype": "float32"}
    timed = {"seconds": 8.0, "images_per_second": 10.5, "speedup": 2.8, "flops_speedup": 4.4}
    random = about | timed | {"method": "PRI v=4, random", "sparsity": 0.75, "agreement": 0.9, "w4a8": 0.99, "transfer": 0.88}
    return [random, about | {"method": "real images", "sparsity": 0.0, "agreement": 1.0}]


def claims() -> list[dict]:
    about = at() | {"kind": "claims", "model": suites.BASE, "batch": 4, "rounds": 3}
    over = {"ours": {"SMI": 3.8, "PRI v=7": 11.0}, "eager": {"SMI": 3.0, "PRI v=7": 9.0}}
    return [
        about | {"side": side, "method": method, "over_dense": [x - 0.1, x, x + 0.1]} for side, found in over.items() for method, x in found.items()
    ]


def method() -> list[dict]:
    """As `bench.methods` appended them until it was no longer run."""
    place = {"device": {"name": "X", "threads": 1, "capability": "AVX2"}, "versions": {"torch": "2.0"}, "commit": "0123456789", "dirty": True}
    about = {"kind": "method", "method": "SMI", "model": suites.TINY, "engine": "reference"}
    return [place | about | {"seconds_per_image": 2.5, "speedup": 2.2, "flops_speedup": 4.4}]


def fuzz() -> list[dict]:
    about = at() | {"kind": "fuzz", "what": "files", "seed": 7, "seconds": 600.0, "cases": 1000}
    outcomes = {"refused": 700, "read": 298, "finding": 2}
    return [about | {"outcomes": outcomes, "findings": ["KeyError"], "parts": {"images.json": {"bits": 600}, "progress": {"bits": 400}}}]


def ranges() -> list[dict]:
    """Real images, those that stand beside them, and one case that changes everything."""
    about = ABOUT | {"kind": "ranges", "time": WHEN, "model": "deit", "widths": "W6/A6", "ranges": "minmax", "percentile": 99.9, "count": 32}
    about |= {
        "tv_weight": 1e-4,
        "pixel_noise": 0.0,
        "noise_images": 0,
        "borrowed": "",
        "accuracy": 0.5,
        "interval": 0.02,
        "paired": [-0.05, 0.02, 0.03],
    }
    names = ["tokens", "heads.0", "head_outputs.0"]
    parts = ["attn.qkv", "attn.qkv_output", "attn.scores", "attn.proj", "attn.proj_output", "mlp.fc2", "mlp.fc2_output", "attn_sum", "mlp_sum"]
    names += [f"blocks.0.{part}" for part in parts]
    sets = [("real", 20, 1.0), ("pri4", 20, 1.5), ("pri4", 400, 2.0), ("psaq", 20, 0.5)]
    made = [
        about | {"images": images, "iterations": count, "point_ranges": dict.fromkeys(names, [-wide, wide])} for images, count, wide in sets
    ]  # fmt: skip
    other = {"ranges": "percentile", "count": 8, "tv_weight": 5e-3, "pixel_noise": 0.5, "noise_images": 32, "borrowed": "scores"}
    return [*made, made[2] | other]


def every() -> list[dict]:
    """Rows of every kind."""
    made = [*step(), *step(suites.PATCHES), *step(suite="scaling", depth=24), *whole("dense", 2.0, 1.0), *whole("PRI v=7", 20.0, 10.0)]
    made += [*memory(), *operation(), *verdict(), *evidence(), *evidence("cifar10", 1e-4), *evidence("cifar10", copy=0.7), *imagenet()]
    return made + [*int8(), *agreement(), *cpu_attention(), *demo(), *claims(), *method(), *fuzz(), *ranges()]
