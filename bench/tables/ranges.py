"""Tables of `python -m bench.experiments.ranges`: accuracies by calibration, and ranges of activations beside those by real images."""

import statistics
from collections.abc import Callable, Sequence

from .rows import Measurement, current
from .table import Layout, Table

POINTS = {  # kinds of activations of the published recipe, and how their names end
    "embedding": ("tokens", "positions", "embedded"),
    "after LayerNorm": (".qkv", ".fc1", "heads.0"),
    "output of qkv": (".qkv_output",),
    "scores": (".scores",),
    "attention output": (".proj",),
    "output of proj": (".proj_output",),
    "after GELU": (".fc2",),
    "output of fc2": (".fc2_output",),
    "residual sums": ("_sum",),
    "logits": ("head_outputs.0",),
}
SETS = ("real images", "PRI v=4, 20 iterations", "PRI v=4, 400 iterations", "PSAQ-ViT, 20 iterations")  # whose ranges stand side by side
TITLES = {"real": "real images", "pri4": "PRI v=4", "psaq": "PSAQ-ViT"}
RESIDUAL_SUM = "blocks.{}.mlp_sum"


def kind_of(activation: str) -> str:
    """The kind that an activation's name ends like."""
    return next(kind for kind, ends in POINTS.items() if activation.endswith(ends))


def title(row: dict) -> str:
    """What calibrated."""
    parts = [TITLES[row["images"]]]
    parts += [] if row["images"] == "real" else [f"{row['iterations']} iterations"]
    parts += [f"{row['count']} images"] if row["count"] != 32 else []
    parts += [f"a_tv {row['tv_weight']:g}"] if row["tv_weight"] != 1e-4 else []
    parts += [f"noise of {row['pixel_noise']:g} on the pixels"] if row["pixel_noise"] else []
    parts += [f"{row['noise_images']} noise images beside"] if row["noise_images"] else []
    parts += [f"{row['borrowed']} as with real images"] if row["borrowed"] else []
    return ", ".join(parts)


def _ranges(measurement: Measurement) -> list[list[str]]:
    lines = []
    for row in measurement.rows:
        ranges = f"percentile {row['percentile']:g}" if row["ranges"] == "percentile" else row["ranges"]
        difference, half, p = row["paired"]
        apart = "" if row is measurement.about else f"{100 * difference:+.1f} ± {100 * half:.1f} (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})"
        lines.append([title(row), ranges, f"{100 * row['accuracy']:.1f} ± {100 * row['interval']:.1f}", apart])
    return lines


RANGES = Layout("Calibrations of W6/A6, published", ("calibrated with", "ranges", "top-1, %", "minus real images, minmax"), _ranges)


def _sets(measurement: Measurement) -> list[dict[str, list[float]]]:
    """Ranges from the least to the greatest value that each set of images gave."""
    plain = {title(row): row["point_ranges"] for row in measurement.rows if row["ranges"] == "minmax"}
    return [plain[name] for name in SETS]


def _widths(measurement: Measurement) -> list[list[str]]:
    real, *others = _sets(measurement)
    lines = []
    for kind in POINTS:
        names = [name for name in real if kind_of(name) == kind]
        lines.append([kind])
        for ranges in others:
            shares = [(ranges[name][1] - ranges[name][0]) / (real[name][1] - real[name][0]) for name in names]
            lines[-1].append(f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")
    return lines


WIDTHS = Layout("Widths of ranges over those by real images: median (least to greatest)", ("activations", *SETS[1:]), _widths)


def _residual(measurement: Measurement) -> list[list[str]]:
    sets, lines = _sets(measurement), []
    while (name := RESIDUAL_SUM.format(len(lines))) in sets[0]:
        lines.append([str(len(lines)), *(f"{ranges[name][0]:.1f} to {ranges[name][1]:.1f}" for ranges in sets)])
    return lines


RESIDUAL = Layout("Ranges of the residual stream behind each block", ("block", *SETS), _residual)


def _tables(layout: Layout) -> Callable[[Sequence[dict]], list[Table]]:
    def make(rows: Sequence[dict]) -> list[Table]:
        return layout.tables(current(rows, "ranges"))

    make.__doc__ = f"{layout.title}."
    return make


MAKERS = {"ranges": _tables(RANGES), "ranges-widths": _tables(WIDTHS), "ranges-residual": _tables(RESIDUAL)}
