"""Records the loops and the step that test_recording.py looks at, in a process of its own, in which Triton does not interpret. Prints JSON."""

import json
import sys
import warnings
from collections import Counter

from bench.roofline import fake_device, loops, model, work
from bench.roofline.recording import Launch

SMALL = ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "num_classes": 10})  # 16 patches
RUNS = {  # options of the model, settings
    "dense": ({}, {"method": "dense", "iterations": 3}),
    "smi": ({}, {"method": "smi", "iterations": 6, "prune_at": [1, 3]}),
    "pri": ({}, {"method": "pri", "iterations": 6, "division": 3}),
    "chunks": ({}, {"method": "pri", "iterations": 6, "division": 2, "max_memory": 0.0017}),
    "layer scale": ({"init_values": 0.1}, {"method": "smi", "iterations": 4, "prune_at": [2]}),
    "query-key norm": ({"qk_norm": True}, {"method": "smi", "iterations": 4, "prune_at": [2]}),
    "average pool": ({"global_pool": "avg"}, {"method": "smi", "iterations": 4, "prune_at": [2]}),
    "float32, every pixel": ({}, {"method": "smi", "iterations": 4, "prune_at": [2], "dtype": "float32", "update": "all"}),
    "recompute": ({"reg_tokens": 4, "act_layer": "gelu_tanh"}, {"method": "dense", "iterations": 3, "recompute": True}),
}


def record_run(name: str, version: str, device: fake_device.Device = fake_device.H200) -> dict:
    """What a run did and made."""
    base, options = SMALL
    more, settings = RUNS[name]
    recording, images = loops.record_inversion(base, version, device, model_options=options | more, num_images=6, batch_size=4, **settings)
    return {
        "problems": recording.problems,
        "replays": recording.replays,
        "kernels": [dict(Counter(kernel.name for kernel in step)) for step in recording.steps],
        "images": list(images.patches.shape),
    }


def record_step() -> dict:
    """One step of DeiT-Tiny at 46 patches, compiled: its kernels, and FLOPs, bytes and the modelled time of all."""
    kernels = loops.record_step("deit_tiny_patch16_224", 46, 128)
    found = [model.estimate(kernel) for kernel in kernels]
    one = next(kernel for kernel in kernels if isinstance(kernel, Launch) and kernel.name == "linear_gelu_fwd")
    return {
        "kernels": dict(Counter(kernel.name for kernel in kernels)),
        "flops": sum(each.flops for each in found),
        "bytes": sum(each.bytes for each in found),
        "milliseconds": 1e3 * sum(each.seconds for each in found),
        "spilling": [each.name for each in found if each.code and each.code.spills],
        "linear_gelu_fwd": list(work.work_of(one)),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    runs = {f"{name}, triton": record_run(name, "triton") for name in RUNS}
    runs |= {f"{name}, stock": record_run(name, "stock") for name in ("dense", "smi", "pri")}
    runs["pri, triton, A10"] = record_run("pri", "triton", fake_device.A10)
    json.dump({"runs": runs, "step": record_step()}, sys.stdout)


if __name__ == "__main__":
    main()
