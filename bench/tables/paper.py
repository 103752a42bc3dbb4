"""The published tables with three columns, published, baseline here, ours here, from the newest run of the suites on this device.

    python -m bench.paper                        print; write bench/results/paper.md, speedup.png and tokens.png
    python -m bench.paper --device nvidia-h200   from another device's rows
    python -m bench.paper --all-runs             the newest row of every case, whichever run it is from

What the rows do not hold is named as missing; run `python -m bench.run` for it.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from smi import cost
from smi.environment import info_table
from smi.files import write_text
from smi.inversion.schedules import make_schedule
from smi.models.vit import ViT, describe
from smi.report.published import DENSE_ITS, PRI_OVER_DENSE, PRI_OVER_SMI, PUBLISHED

from .cases import suites
from .cases.suites import BASE, ITERATIONS, TINY, WholeCase
from .measuring import record
from .tables.plots import plot_speedups, plot_tokens
from .tables.terminal import print_table

MISSING = "missing"
TITLES = {TINY: "DeiT-Tiny/16", suites.SMALL: "DeiT-Small/16", BASE: "DeiT-Base/16"}
MODELS = {title: model for model, title in TITLES.items()}


CLAIMS = (f"{PRI_OVER_DENSE} over dense", f"{PRI_OVER_SMI} over SMI")
METHODS = tuple(WholeCase("", method, options.get("division"), 1, 1, ()) for method, options in suites.METHODS)


@dataclass(frozen=True)
class Goal:
    """The least that a step of ours is to be faster than another side."""

    case: str
    other: str
    least: float


GOALS = {
    "cpu": (
        Goal(suites.StepCase(BASE, 4, suites.final_smi()).name, "eager", 3.3),
        Goal(suites.StepCase(TINY, 8, suites.final_smi()).name, "eager", 3.5),
        Goal(suites.StepCase(BASE, 4).name, "eager", 2.9),
    ),
    "cuda": tuple(
        Goal(suites.StepCase(BASE, 128, active).name, other, least)
        for active in (None, suites.final_smi())
        for other, least in (("eager", 20.0), ("compiled", 1.5))
    ),
}
WHOLE_GOAL = {"cpu": 30.0, "cuda": 100.0}  # PRI v=7 of ours over dense eager, DeiT-Base, finished images per second

Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="name of its result file, without .jsonl; without it this machine's")
    parser.add_argument("--all-runs", action="store_true", help="the newest row of every case")
    parser.add_argument("--output", type=Path, default=record.RESULTS, help="folder of paper.md and the plots")
    options = parser.parse_args(arguments)
    path = record.RESULTS / f"{options.device}.jsonl" if options.device else record.results_file(info_table()["devices"][-1]["name"])
    rows = record.read(path)
    rows = [row for row in rows if "run" in row] if options.all_runs else record.newest_run(rows)
    if not rows:
        print(f"{path} holds no run of the suites: python -m bench.run makes one", file=sys.stderr)
        return 1
    results = Results(rows)
    tables = [speed_table(results), flops_table(), memory_table(results), pri_table(results), goal_table(results)]
    for title, columns, lines in tables:
        print_table(title, columns, lines)
    options.output.mkdir(parents=True, exist_ok=True)
    plots = [plot_speedups(results, options.output / "speedup.png"), plot_tokens(results, options.output / "tokens.png")]
    write_text(options.output / "paper.md", as_markdown(results, tables, [plot for plot in plots if plot]))
    missing = sum(cell == MISSING for _, _, lines in tables for line in lines for cell in line)
    print(f"wrote {options.output / 'paper.md'}" + (f"; {missing} figures are missing: python -m bench.run measures them" if missing else ""))
    return 0


class Results:
    """Rows of a run, the newest where a case occurs twice."""

    def __init__(self, rows: list[dict]):
        self.rows, self.about = rows, rows[-1]
        self.found = {(row["kind"], row.get("case"), row.get("side")): row for row in rows if "side" in row}

    @property
    def on(self) -> str:
        return "cuda" if "architecture" in self.about else "cpu"

    def get(self, kind: str, case: str, side: str) -> dict | None:
        row = self.found.get((kind, case, side))
        return None if row is None or "not_timed" in row or "not_measured" in row else row

    def whole(self, model: str, title: str, side: str) -> dict | None:
        rows = [row for (kind, _, s), row in self.found.items() if (kind, s, row.get("model"), row.get("method")) == ("whole", side, model, title)]
        return rows[-1] if rows else None

    def steps(self, model: str, side: str) -> dict[int, dict]:
        """By active patches, at the one batch of the suite of steps."""
        chosen = [row for (kind, _, s), row in self.found.items() if (kind, s) == ("step", side) and "ms" in row and row["model"] == model]
        return {row["active"]: row for row in chosen if row.get("suite") == "steps" and not row["options"]}

    def its(self, model: str, method: WholeCase, side: str) -> tuple[float, int, str] | None:
        """Iterations per second over a run, the batch, and how that was found: from a whole run, or from the steps of all its stages."""
        row = self.whole(model, method.title, side)
        if row:
            return row["iterations_per_second"], row["batch"], "whole runs"
        steps, schedule = self.steps(model, side), make_schedule(method.method, suites.PATCHES, ITERATIONS, **method.options)
        if any(stage.active not in steps for stage in schedule.stages()):
            return None
        seconds = sum((stage.stop - stage.start) * steps[stage.active]["ms"][1] / 1e3 for stage in schedule.stages())
        return ITERATIONS / seconds, steps[suites.PATCHES]["batch"], "steps"

    def images_per_second(self, model: str, method: WholeCase, side: str) -> float | None:
        row, steps = self.whole(model, method.title, side), self.its(model, method, side)
        if row:
            return row["images_per_second"][1]
        if steps is None:
            return None
        per_trajectory = make_schedule(method.method, suites.PATCHES, ITERATIONS, **method.options).images_per_trajectory
        return steps[0] / ITERATIONS * steps[1] * per_trajectory


def vit_of(model: str) -> ViT:
    with torch.device("meta"):
        return describe(timm.create_model(model))


def ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}x" if a and b else MISSING


def speed_table(results: Results) -> Table:
    """Iterations per second, and SMI over dense."""
    lines = []
    for line in PUBLISHED:
        dense, method = METHODS[0], next(m for m in METHODS if m.method == line.method)
        here = {side: results.its(MODELS[line.model], method, side) for side in ("eager", "ours")}
        base = {side: results.its(MODELS[line.model], dense, side) for side in here}
        cells = [f"{line.its:.2f} ({line.its / DENSE_ITS[line.model]:.2f}x)"]
        for side, its in here.items():
            gain = ratio(its and its[0], base[side] and base[side][0])
            cells.append(f"{its[0]:.3f} ({gain}), batch {its[1]}, {its[2]}" if its else MISSING)
        ours_over_eager = ratio(here["ours"] and here["ours"][0] * here["ours"][1], here["eager"] and here["eager"][0] * here["eager"][1])
        lines.append([f"{line.model} {method.title}", *cells, ours_over_eager])
    columns = ["iterations per second (over dense)", "published", "baseline here: eager", "ours here", "ours over eager, same work"]
    return "Throughput", columns, lines


def flops_table() -> Table:
    lines = []
    for line in PUBLISHED:
        vit, method = vit_of(MODELS[line.model]), next(m for m in METHODS if m.method == line.method)
        schedule = make_schedule(method.method, vit.num_patches, ITERATIONS, **method.options)
        last = cost.step_flops(vit, schedule.patches_per_image, cls_only=True)
        mean = cost.trajectory_flops(vit, schedule, cls_only=True) / ITERATIONS
        cells = [f"{line.gflops:.2f}", f"{cost.published_gflops(vit, schedule):.2f}", f"{last / 1e9:.2f}", f"{mean / 1e9:.2f}"]
        lines.append([f"{line.model} {method.title}", *cells])
    columns = ["GFLOP", "published, its own rule", "that rule here", "ours per image and step, last stage", "ours, mean of the run"]
    return "FLOPs (the published rule counts a batch of 128 and weight gradients, and leaves attention's products out)", columns, lines


def memory_table(results: Results) -> Table:
    """Kept for backward, and peak of a process, of every case that was measured."""
    lines = []
    for line in PUBLISHED:
        method = next(m for m in METHODS if m.method == line.method)
        active = None if line.method == "dense" else suites.final_smi()
        cases = [row["case"] for (kind, _, side), row in results.found.items() if kind == "memory" and side == "ours"]
        case = next((c for c in cases if c in {suites.StepCase(MODELS[line.model], batch, active).name for batch in range(1, 1025)}), None)
        found = {side: results.get("memory", case, side) if case else None for side in ("eager", "ours", "recompute")}
        cells = [f"{line.memory:.0f} MB", *map(_memory, found.values()), *(_share(found[side], found["eager"]) for side in ("ours", "recompute"))]
        lines.append([f"{line.model} {method.title}", *cells])
    columns = ["kept for backward / peak above idle", "published: on the GPU", "baseline here: eager", "ours here", "ours, recompute"]
    columns += ["ours of eager", "recompute of eager"]
    return "Memory (the published batch is not named)", columns, lines


def _memory(row: dict | None) -> str:
    return f"{row['kept_bytes'] / 1e6:.0f} / {row['peak_above_idle_bytes'] / 1e6:.0f} MB, batch {row['batch']}" if row else MISSING


def _share(row: dict | None, of: dict | None) -> str:
    return " / ".join(f"{row[key] / of[key]:.0%}" for key in ("kept_bytes", "peak_above_idle_bytes")) if row and of else MISSING


def pri_table(results: Results) -> Table:
    """Finished images per second of every method and side."""
    lines = []
    for model in (TINY, BASE):
        dense_eager = results.images_per_second(model, METHODS[0], "eager")
        dense_ours = results.images_per_second(model, METHODS[0], "ours")
        smi_ours = results.images_per_second(model, METHODS[1], "ours")
        for method in METHODS:
            here = {side: results.images_per_second(model, method, side) for side in ("eager", "ours")}
            cells = [f"{here[side]:.5f}" if here[side] else MISSING for side in here]
            gains = [ratio(here["ours"], other) for other in (dense_ours, smi_ours, dense_eager)]
            claim = ", ".join(CLAIMS) if method.division == 7 else ""
            lines.append([f"{TITLES[model]} {method.title}", claim, *cells, *gains])
    columns = ["finished images per second", "published claim", "baseline here: eager", "ours here"]
    return "Patch rebirth", [*columns, "ours over our dense", "ours over our SMI", "ours over dense eager"], lines


def share_of_products(row: dict | None) -> str:
    return f"{row['share_of_products']:.0%} ({row['dtype']})" if row and row.get("share_of_products") else MISSING


def goal_table(results: Results) -> Table:
    lines = []
    for goal in GOALS[results.on]:
        row = results.get("step", goal.case, "ours")
        over = row and row.get(f"over_{goal.other}")
        text = f"{over[1]:.2f}x ({over[0]:.2f}-{over[2]:.2f})" if over else MISSING
        lines.append([f"step: {goal.case}, over {goal.other}", f"{goal.least}x", text, share_of_products(row)])
    ours, eager = (results.images_per_second(BASE, method, side) for method, side in ((METHODS[-1], "ours"), (METHODS[0], "eager")))
    lines.append([f"images per second: {TITLES[BASE]} PRI v=7 over dense eager", f"{WHOLE_GOAL[results.on]}x", ratio(ours, eager),
                  share_of_products(results.whole(BASE, METHODS[-1].title, "ours"))])  # fmt: skip
    return "Held to", ["figure", "at least", "here (20-80 %)", "of the measured product rate"], lines


def as_markdown(results: Results, tables: Sequence[Table], plots: Sequence[Path]) -> str:
    """The file: where it was measured, tables, plots."""
    about = results.about
    keys = [key for key in ("device", "device_class", "threads", "torch", "triton", "timm", "python", "time", "commit", "dirty") if key in about]
    lines = ["# Published, baseline, ours", "", "Measured on " + ", ".join(f"{key} {about[key]}" for key in keys) + ".", ""]
    for title, columns, rows in tables:
        lines += [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return "\n".join(lines + [f"![{plot.stem}]({plot.name})\n" for plot in plots])


if __name__ == "__main__":
    sys.exit(main())
