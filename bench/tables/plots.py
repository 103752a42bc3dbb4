"""The two plots of `bench.paper`: speed-up against sparsity, and time against tokens with the roofline; and that of ImageNet's evidence."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from smi import cost
from smi.files import replace_file
from smi.inversion.methods import COMPARED, DENSE, GAUSSIAN, REAL
from smi.inversion.schedules import make_schedule
from smi.models.vit import ViT

from ..cases.suites import BASE, ITERATIONS, TINY
from .evidence import HEADINGS, imagenets
from .evidence import TITLES as METHODS
from .results import TITLES, Results, vit_of

SIDES = {"ours": "C0", "compiled": "C2", "eager": "C1"}
BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
SAVED = 9  # activations per token, layer and width that backward needs: qkv (3), the MLP's hidden layer (4), two norms' inputs


def plot_speedups(results: Results, path: Path) -> Path | None:
    """Finished images per second over dense eager; None where there is nothing to draw."""
    figure, axes = new_figure(len((TINY, BASE)))
    drawn = False
    for axis, model in zip(axes, (TINY, BASE), strict=True):
        base, vit = results.images_per_second(model, DENSE, "eager"), vit_of(model)
        if not base:
            nothing(axis, TITLES[model])
            continue
        drawn = True
        schedules = {m: make_schedule(m.name, vit.num_patches, ITERATIONS, **m.options) for m in COMPARED}
        dense = cost.image_flops(vit, schedules[DENSE], cls_only=True)
        for side, above in (("ours", 7), ("eager", -12)):  # points of the two may lie on one another
            points = {m: results.images_per_second(model, m, side) for m in COMPARED}
            points = {m: value / base for m, value in points.items() if value}
            axis.plot([schedules[m].sparsity for m in points], list(points.values()), "o", color=SIDES[side], label=side)
            for m, value in points.items():
                place = {"textcoords": "offset points", "xytext": (0, above), "ha": "center"}
                axis.annotate(m.title, (schedules[m].sparsity, value), **place, fontsize=7, color=SIDES[side])
        predicted = [dense / cost.image_flops(vit, schedules[m], cls_only=True) for m in COMPARED]
        axis.plot([schedules[m].sparsity for m in COMPARED], predicted, "_", color="grey", markersize=14, label="FLOPs predict, over dense")
        axis.set(title=TITLES[model], xlabel="sparsity", ylabel="images per second over dense eager", yscale="log", xlim=(-0.05, 1.05))
        axis.margins(y=0.12)  # room for the labels
        ticks(axis.yaxis, (1, 2, 5, 10, 20, 50))
        axis.legend(fontsize=8)
    return save(figure, path) if drawn else None


def plot_tokens(results: Results, path: Path) -> Path | None:
    """Milliseconds of a step against tokens, every side, and the floor that the measured GEMM and copy rates set."""
    figure, axes = new_figure(len((TINY, BASE)))
    drawn = False
    for axis, model in zip(axes, (TINY, BASE), strict=True):
        vit = vit_of(model)
        if not results.steps(model, "ours"):
            nothing(axis, TITLES[model])
            continue
        drawn = True
        for side, colour in SIDES.items():
            rows = sorted(results.steps(model, side).values(), key=lambda row: row["tokens"])
            axis.plot([row["tokens"] for row in rows], [row["ms"][1] for row in rows], "o-", color=colour, label=side, markersize=4)
        for dtype in sorted({row["dtype"] for row in results.steps(model, "ours").values()}):
            counts = range(14, vit.num_patches + 1)
            batch = next(iter(results.steps(model, "ours").values()))["batch"]
            floors = [floor_ms(vit, batch, n, dtype, results.about) for n in counts]
            axis.plot([n + vit.num_prefix for n in counts], floors, ":", color="grey", label=f"roofline, {dtype}")
        axis.set(title=TITLES[model], xlabel="tokens", ylabel="ms per step", xscale="log", yscale="log")
        ticks(axis.xaxis, (15, 30, 50, 100, 200, 500))
        ticks(axis.yaxis, (20, 50, 100, 200, 500, 1000, 2000, 5000))
        axis.legend(fontsize=8)
    return save(figure, path) if drawn else None


def plot_iterations(rows: Sequence[dict], path: Path) -> Path | None:
    """ImageNet: top-1 against the iterations of the images that calibrated, W8/A8 and W6/A6 under the published recipe, with 95 % intervals; None
    where there is nothing to draw."""
    by_iterations = {found.about["config"]["iterations"]: {row["method"]: row for row in found.rows} for found in imagenets(rows)}
    if not by_iterations:
        return None
    figure, axes = new_figure(2)
    for axis, column in zip(axes, ("published_w8a8", "published_w6a6"), strict=True):
        methods = dict.fromkeys(method for found in by_iterations.values() for method in found)
        for i, method in enumerate(methods):
            made = {count: found[method] for count, found in by_iterations.items() if column in found.get(method, {})}
            values = [100 * statistics.mean(row[column]) for row in made.values()]
            if not made or method == GAUSSIAN.key:
                continue
            if method == REAL.key:
                mean, half = values[0], 100 * next(iter(made.values()))["interval"][column]
                axis.axhline(mean, color="black", linestyle="--", linewidth=1, label=METHODS[method])
                axis.axhspan(mean - half, mean + half, color="black", alpha=0.08, linewidth=0)
                continue
            halves = [100 * row["interval"][column] for row in made.values()]
            places = [count * 1.02 ** (i - len(methods) / 2) for count in made]  # side by side, so that the intervals are seen
            axis.errorbar(places, values, halves, fmt="o-", markersize=4, capsize=2, linewidth=1, label=METHODS[method])
        noise = [100 * statistics.mean(found[GAUSSIAN.key][column]) for found in by_iterations.values() if column in found.get(GAUSSIAN.key, {})]
        beside = f" (noise: {statistics.mean(noise):.0f} %)" if noise else ""
        axis.set(title=f"{HEADINGS[column]}{beside}", xlabel="iterations", ylabel="top-1 of 1,000 ImageNet images, %", xscale="log")
        ticks(axis.xaxis, (20, 50, 100, 200, 400, 1000, 4000))
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=len(methods))
    return save(figure, path)


def floor_ms(vit: ViT, batch: int, active: int, dtype: str, about: dict) -> float:
    """The longer of: the step's GEMMs at their measured rate; its weights read twice and saved activations written and read, at the copy rate."""
    flops = batch * cost.step_flops(vit, active, cls_only=True)
    weights = sum(tensor.numel() for tensor in vit.tensors())
    saved = batch * (active + vit.num_prefix) * SAVED * vit.embed_dim * len(vit.blocks)
    moved = BYTES[dtype] * 2 * (weights + saved)
    return 1e3 * max(flops / about["product_gigaflops"][dtype], moved / about["copy_gigabytes_per_second"]) / 1e9


def new_figure(columns: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4.2), dpi=110, layout="constrained")
    return figure, figure.subplots(1, columns)


def ticks(axis, values: tuple[float, ...]) -> None:
    """Plain numbers at these places of a logarithmic axis, as far as they lie within what is drawn."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_locator(NullLocator())


def nothing(axis, title: str) -> None:
    axis.set(title=f"{title}: not measured", xticks=[], yticks=[])


def save(figure, path: Path) -> Path:
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path
