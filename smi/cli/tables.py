"""What the commands print, as data and as tables."""

import sys
from dataclasses import asdict

import torch

from .. import cost
from ..engine import Mode
from ..errors import InputError
from ..inversion.memory_estimate import step_memory
from ..inversion.schedules import Schedule, make_schedule
from ..inversion.settings import MOST
from ..models.by_name import EMBEDDED, load_model
from ..models.vit import ViT, describe

DEFAULT_DIVISIONS = (2, 4, 7)
DEMO_WIDTH = 112  # characters that the demo's table takes
EXPLANATION = """\
published rule: 384 x the forward multiply-adds with the last stage's tokens, patch embedding dense, attention's products left out.
GFLOP/step: every matrix product of the reference engine, forward and backward to the pixels; floor: with the last block computed for CLS alone."""


def cost_table(model: str, image_size: tuple[int, int] | None, method: str | None, iterations: int, batch_size: int, options: dict) -> dict:
    """FLOPs and memory of the methods on a model, without building its weights."""
    if not 1 <= batch_size <= MOST:
        raise InputError(f"batch-size must be a whole number from 1 to {MOST}, got {batch_size}")
    if method is None and any(value is not None for value in options.values()):
        raise InputError("the options of a schedule need --method")
    if model == EMBEDDED:
        vit = describe(load_model(model)).to("meta", torch.float32)
    else:
        vit = describe(_without_weights(model, image_size)).to("meta", torch.float32)
    if method is None:
        cases = [("dense", {}), ("smi", {}), *(("pri", {"division": v}) for v in DEFAULT_DIVISIONS if v <= vit.num_patches)]
    else:
        cases = [(method, options)]
    reference = make_schedule("dense", vit.num_patches, iterations)
    rows = [_cost_row(vit, name, make_schedule(name, vit.num_patches, iterations, **given), reference, batch_size) for name, given in cases]
    divisions = sorted({row["images_per_trajectory"] for row in rows if row["images_per_trajectory"] > 1})
    theorems = [asdict(cost.theorem(vit.num_patches, vit.embed_dim, v)) for v in divisions]
    return {
        "model": vit.name,
        "patches": vit.num_patches,
        "embed_dim": vit.embed_dim,
        "iterations": iterations,
        "batch_size": batch_size,
        "rows": rows,
        "theorem": theorems,
    }


def _without_weights(model: str, image_size: tuple[int, int] | None) -> torch.nn.Module:
    try:
        return load_model(model, random_weights=True, image_size=image_size, device="meta")
    except InputError:  # of the input, which then is said again, or of an early timm 1.0, which computes on what it builds
        return load_model(model, random_weights=True, image_size=image_size)


def _cost_row(vit: ViT, name: str, schedule: Schedule, reference: Schedule, batch_size: int) -> dict:
    peak = step_memory(vit, batch_size, schedule.num_patches, Mode(torch.float32))
    last = step_memory(vit, batch_size, list(schedule.stages())[-1].active, Mode(torch.float32))
    honest = cost.image_flops(vit, schedule)
    return {
        "method": name,
        "patches_per_image": schedule.patches_per_image,
        "sparsity": schedule.sparsity,
        "images_per_trajectory": schedule.images_per_trajectory,
        "published_gflops": cost.published_gflops(vit, schedule),
        "step_gflops_mean": cost.trajectory_flops(vit, schedule) / schedule.iterations / 1e9,
        "step_gflops_last": cost.step_flops(vit, list(schedule.stages())[-1].active) / 1e9,
        "image_tflops": honest / 1e12,
        "floor_image_tflops": cost.image_flops(vit, schedule, cls_only=True) / 1e12,
        "speedup": cost.image_flops(vit, reference) / honest,
        "memory_first_gib": peak.total / 2**30,
        "memory_last_gib": last.total / 2**30,
    }


def _table(title: str, *columns: str):
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 130)


def print_cost(table: dict) -> None:
    shown = _table(
        "{model}, {iterations} iterations: per step of one trajectory, per finished image; memory of {batch_size} trajectories".format(**table),
        *("method", "patches", "published rule, GFLOPs", "GFLOP/step, mean", "last stage", "TFLOP/image", "floor", "speed-up"),
        *("GiB, first stage", "last"),
    )
    for row in table["rows"]:
        name = row["method"] if row["images_per_trajectory"] == 1 else f"{row['method']} v={row['images_per_trajectory']}"
        shown.add_row(
            name,
            f"{row['patches_per_image']}/{table['patches']}",
            f"{row['published_gflops']:.2f}",
            f"{row['step_gflops_mean']:.2f}",
            f"{row['step_gflops_last']:.2f}",
            f"{row['image_tflops']:.2f}",
            f"{row['floor_image_tflops']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['memory_first_gib']:.2f}",
            f"{row['memory_last_gib']:.2f}",
        )
    console = _console()
    console.print(shown)
    console.print(EXPLANATION)
    if table["theorem"]:
        shown = _table(
            "PRI's theorem: cost per finished image, dense = 1",
            *("v", "linear, PRI (v+1)/(2v^2)", "idealised SMI 1/v"),
            *("self-attention, PRI", "idealised SMI", "N/d", "PRI cheaper while N/d <"),
        )
        for t in table["theorem"]:
            values = (t["pri_linear"], t["smi_linear"], t["pri_attention"], t["smi_attention"], t["patches_over_dim"], t["bound"])
            shown.add_row(str(t["division"]), *(f"{value:.4f}" for value in values))
        console.print(shown)


def print_info(table: dict) -> None:
    console = _console()
    console.print("  ".join(f"{name} {version}" for name, version in table["versions"].items()))
    for device in table["devices"]:
        size = f"{device['threads']} threads" if "threads" in device else f"{device['memory_gib']:.0f} GiB"
        print(f"{device['device']}: {device['name']} ({size}, {device['capability']})")
    shown = _table(f"kernels (SMI_BACKEND={table['backend']})", "operation", "version", "available", "where, or why not")
    for row in table["kernels"]:
        shown.add_row(row["operation"], row["version"], "yes" if row["available"] else "no", row["reason"])
    console.print(shown)


def print_demo(result: dict) -> None:
    """The table, in two parts where the terminal is narrow."""
    console, rows = _console(), result["table"]
    title = "digits teacher, {images} images each, {iterations} iterations, batches of {batch_size} trajectories, a_tv {tv_weight:g}, {device}"
    title = title.format(images=rows[0]["images"], **result["settings"])
    cost = {
        "sparsity": ("sparsity", "{:.0%}"), "seconds": ("seconds", "{:.1f}"), "images/s": ("images_per_second", "{:.1f}"),
        "speed-up": ("speedup", "{:.2f}x"), "FLOPs\npredict": ("flops_speedup", "{:.2f}x"),
    }  # fmt: skip
    shares = {"teacher\nagrees": "agreement", "W8/A8": "w8a8", "W4/A8": "w4a8", "student": "transfer"}
    worth = {head: (name, "{:.1%}") for head, name in shares.items() if any(name in row for row in rows)}
    for columns in ({**cost, **worth},) if console.width >= DEMO_WIDTH else (cost, worth):
        shown = _table(title, "method", *columns)
        for row in rows:
            shown.add_row(row["method"], *(form.format(row[name]) if name in row else "" for name, form in columns.values()))
        console.print(shown)
        title = ""
    if "full" in result:
        print(f"on real test images: the teacher {result['full']:.1%}, quantised with the images of a row, and a student that learned from them")
    for note in result["notes"]:
        print(note)
    print(f"picture: {result['picture']}\nreport: {result['report']}")


def print_distilled(result, output) -> None:
    """A learning curve of at most ten lines."""
    shown = _table("learning curve", "step", "loss", "KL held out", "agrees with the teacher", "accuracy on real images")
    every = -(-len(result.curve) // 10)
    for row in result.curve[every - 1 :: every]:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        shown.add_row(str(row["step"]), f"{row['loss']:.4f}", f"{row['kl']:.4f}", f"{row['agreement']:.1%}", accuracy)
    console = _console()
    console.print(shown)
    real = "" if result.accuracy is None else f", {result.accuracy:.1%} of the real images recognised"
    ended = " (stopped early)" if result.stopped_early else ""
    print(f"{result.steps} steps{ended}; best at step {result.best['step']}{real}; student written to {output}")


def print_evaluation(result, folder) -> None:
    """Recognition by stage and by another model, and likeness to real images."""
    shown = _table(f"images in {folder}", "read by", "images", "agree with their label", "confidence", "cross-entropy")
    rows = [("the model", result.teacher)]
    if len(result.stages) > 1:
        rows += [(f"  stage {number} of {len(result.stages)}", stage) for number, stage in enumerate(result.stages, start=1)]
        rows.append(("  patches at random", result.random))
    if result.verifier is not None:
        rows.append((f"the verifier, {result.verifier.reads}", result.verifier.recognition))
    for name, row in rows:
        shown.add_row(name, str(row.images), f"{row.agreement:.1%}", f"{row.confidence:.3f}", f"{row.cross_entropy:.3f}")
    _console().print(shown)
    if result.verifier is not None:
        print(f"the verifier gives the model's answer to {result.verifier.same_answer:.1%} of the images")
    if result.likeness is not None:
        ssim = "" if result.likeness.ssim is None else f", SSIM {result.likeness.ssim:.3f}"
        print(f"nearest real image of the same class, retained pixels: PSNR {result.likeness.psnr:.1f} dB{ssim} ({result.likeness.images} images)")


def print_verdicts(verdicts: list[dict]) -> None:
    shown = _table("kernel versions on this GPU", "operation", "version", "dtype", "sizes", "correct", "speed over stock PyTorch", "note")
    for row in verdicts:
        correct = "yes" if row["correct"] else "NO"
        shown.add_row(row["operation"], row["version"], row["dtype"], row["size"], correct, f"{row['speedup']:.2f}x", row["note"])
    _console().print(shown)
