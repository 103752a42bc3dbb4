"""The plots of the page. Each function writes one PNG and returns its path."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RunError
from ..files import replace_file

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000", "#8c6d31")  # told apart without red and green
MARKERS = "os^Dv<>P"
DPI = 110
MAP, MAP_GAP, MAP_COLUMNS = 1.5, 0.1, 5  # inches of a map and between two; maps side by side
WIDE = 30  # a range of losses that asks for a logarithmic scale
BAR = 0.8  # of the room between two groups of bars


@dataclass(frozen=True)
class Curve:
    """One line of a plot; `spread` is a standard deviation on either side."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None


def save(figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all; raises RunError where that fails."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))
    except OSError as error:
        raise RunError(f"the picture {path} cannot be written ({error.strerror or error})") from error
    return path


def new_figure(width: float, height: float):
    """A figure of width x height inches that makes room for what is written on it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def plot_maps(maps: Sequence[tuple[str, Tensor]], path: Path) -> Path:
    """Fractions [rows, columns] of a patch grid, one map for each title, on one scale from 0."""
    most = max(float(values.max()) for _, values in maps)
    figure, bar = _maps(maps, (0.0, most), "viridis", "fraction of images")
    bar.ax.yaxis.set_major_formatter(_per_cent())
    return save(figure, path)


def plot_stage_maps(maps: Sequence[tuple[str, Tensor]], stages: int, path: Path) -> Path:
    """For each title the stage, from 0, at which the patch of each cell [rows, columns] left; NaN where none did."""
    from matplotlib import colormaps

    figure, bar = _maps(maps, (-0.5, stages - 0.5), colormaps["viridis"].resampled(stages), "left at stage")
    shown = list(range(0, stages, -(-stages // 10)))
    bar.set_ticks(shown, labels=[str(stage + 1) for stage in shown])
    return save(figure, path)


def _maps(maps: Sequence[tuple[str, Tensor]], limits: tuple[float, float], colours, label: str):
    """A figure of titled maps [rows, columns] on one page in inches from the upper left, and its scale of colours. One page for all: axes of their
    own would take a tenth of a second each."""
    from matplotlib.figure import Figure

    columns = min(MAP_COLUMNS, len(maps))
    lines = -(-len(maps) // columns)
    height, width = maps[0][1].shape
    tall, room = MAP * height / width, 0.26  # inches: of a map, of the title above it
    size = columns * (MAP + MAP_GAP) + 1.1, lines * (tall + room) + MAP_GAP
    figure = Figure(figsize=size, dpi=DPI)
    page = figure.add_axes((0, 0, 1, 1))
    for number, (title, values) in enumerate(maps):
        x, y = MAP_GAP + number % columns * (MAP + MAP_GAP), room + number // columns * (tall + room)
        low, high = limits
        drawn = page.imshow(values.numpy(), vmin=low, vmax=high, cmap=colours, interpolation="nearest", extent=(x, x + MAP, y + tall, y))
        page.text(x + MAP / 2, y - 0.05, title, ha="center", va="bottom", fontsize=9)
    page.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="auto")
    page.axis("off")
    scale = figure.add_axes(((size[0] - 0.95) / size[0], 1 - (room + tall) / size[1], 0.12 / size[0], tall / size[1]))
    bar = figure.colorbar(drawn, cax=scale)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure, bar


def plot_stages(agreement: Sequence[float], confidence: Sequence[float], random: tuple[float, float], path: Path) -> Path:
    """Agreement and confidence by stage beside those of random patches (agreement, confidence)."""
    figure = new_figure(6.0, 3.8)
    axis = figure.subplots()
    numbers = list(range(1, len(agreement) + 1))
    for name, values, level, colour, marker in zip(
        ("agreement", "confidence"), (agreement, confidence), random, COLOURS[:2], MARKERS[:2], strict=True
    ):
        axis.plot(numbers, values, marker=marker, color=colour, label=name)
        axis.axhline(level, color=colour, linestyle=":", label=f"{name}, patches at random")
    axis.set(xlabel="stage at which the image left", ylim=(0, 1.02), xticks=_few(numbers))
    axis.yaxis.set_major_formatter(_per_cent())
    _legend(figure, axis)
    return save(figure, path)


def plot_loss(iterations: Sequence[int], losses: Tensor, events: Sequence[int], path: Path) -> Path:
    """The loss of a batch; events: iterations at which patches left."""
    figure = new_figure(6.4, 3.2)
    axis = figure.subplots()
    axis.plot([iteration + 1 for iteration in iterations], losses.tolist(), color=COLOURS[0])
    for number, event in enumerate(events):
        axis.axvline(event, color="grey", linestyle=":", linewidth=0.8, label="patches leave" if number == 0 else None)
    axis.set(xlabel="iteration", ylabel="loss of the batch")
    if float(losses.min()) > 0 and float(losses.max() / losses.min()) > WIDE:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    if events:
        axis.legend(fontsize=8)
    return save(figure, path)


def plot_bars(groups: Sequence[str], series: Mapping[str, Sequence[float | None]], path: Path, *, label: str, suffix: str = "") -> Path:
    """Bars side by side for each group, one for each series, with their values above; None is left out."""
    figure = new_figure(max(5.0, 1.1 + 0.34 * len(groups) * (len(series) + 0.7)), 3.8)
    axis = figure.subplots()
    width = BAR / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [group + (number - (len(series) - 1) / 2) * width for group in range(len(groups))]
        there = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        axis.bar([place for place, _ in there], [value for _, value in there], width * 0.94, label=name, color=COLOURS[number])
        for place, value in there:
            axis.text(place, value, f"{value:.1f}{suffix}", ha="center", va="bottom", fontsize=7)
    axis.set(ylabel=label)
    axis.set_xticks(range(len(groups)), groups, rotation=20 if sum(map(len, groups)) > 60 else 0, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    _legend(figure, axis)
    return save(figure, path)


def plot_fractions(
    groups: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float] | None]],
    levels: Mapping[str, float],
    path: Path,
) -> Path:
    """For each group a point in every series, (fraction, standard deviation) or None, on a scale of per cent. levels: dashed lines across."""
    figure = new_figure(max(5.5, 1.0 + 0.95 * len(groups)), 4.4)
    axis = figure.subplots()
    for number, (name, values) in enumerate(series.items()):
        there = [(group, *value) for group, value in enumerate(values) if value is not None]
        shift = (number - (len(series) - 1) / 2) * min(0.1, BAR / len(series))
        spreads = [spread for *_, spread in there]
        axis.errorbar(
            [group + shift for group, *_ in there], [value for _, value, _ in there], yerr=spreads if any(spreads) else None,
            fmt=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)], label=name, markersize=6, capsize=2,
        )  # fmt: skip
    for (name, level), colour in zip(levels.items(), ("black", "grey"), strict=False):
        axis.axhline(level, color=colour, linestyle="--", linewidth=0.9, label=name)
    axis.set(ylim=(0, 1.03), xlim=(-0.5, len(groups) - 0.5))
    axis.set_xticks(range(len(groups)), groups, rotation=20 if sum(map(len, groups)) > 60 else 0, fontsize=8)
    axis.yaxis.set_major_formatter(_per_cent())
    axis.grid(axis="y", alpha=0.3)
    _legend(figure, axis)
    return save(figure, path)


def plot_curves(curves: Sequence[Curve], path: Path, *, xlabel: str, ylabel: str) -> Path:
    """Lines with their standard deviation, on a scale of per cent."""
    figure = new_figure(5.6, 4.0)
    axis = figure.subplots()
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(curve.x, curve.y, marker=MARKERS[number % len(MARKERS)], markersize=4, color=colour, label=curve.name)
        if curve.spread is not None:
            low, high = (torch.tensor(curve.y) + sign * torch.tensor(curve.spread) for sign in (-1, 1))
            axis.fill_between(curve.x, low.tolist(), high.tolist(), color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.02))
    axis.yaxis.set_major_formatter(_per_cent())
    axis.grid(alpha=0.3)
    _legend(figure, axis)
    return save(figure, path)


def _legend(figure, axis) -> None:
    """Below what is drawn, where it hides nothing, in as many columns as the width takes."""
    handles, labels = axis.get_legend_handles_labels()
    wide = 0.55 + 0.07 * max(map(len, labels))  # inches of an entry
    columns = max(1, min(len(labels), int(figure.get_figwidth() / wide)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _per_cent():
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1, decimals=0)


def _few(numbers: Sequence[int]) -> list[int]:
    """At most a dozen ticks."""
    return list(numbers[:: -(-len(numbers) // 12)])
