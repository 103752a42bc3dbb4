"""Tables of the experiments: int8, agreement of the engines, attention on the CPU, the demo, fuzzing; and of one that is no longer run."""

from collections.abc import Sequence

from smi import cost
from smi.inversion.methods import DENSE, PRI7, SMI
from smi.inversion.schedules import make_schedule
from smi.report.published import OVER_DENSE

from ..cases.suites import ALL_SIDES, ITERATIONS
from .results import TITLES, vit_of
from .rows import Measurement, current
from .suites import short
from .table import Layout, Table, per_cent

CPU_OURS = ("ours", "kernels", "engine")
CPU_SIDES = ("sdpa", "sdpa in float32", *CPU_OURS)
CLAIMED = (SMI, PRI7)
RANDOM = {"PRI v=4, random": "PRI v=4, patches chosen at random"}


def _int8(measurement: Measurement) -> list[list[str]]:
    return [_int8_line(row) for row in measurement.rows]


def _int8_line(row: dict) -> list[str]:
    times = [f"{row[key] * 1e3:.1f}" for key in ("float32_seconds", "int8_seconds")]
    gains = [f"{row[key]:.2f}x" for key in ("speedup", "speedup_of_smallest")]
    shares = [per_cent(row.get(key), 1) for key in ("accuracy_float32", "accuracy_simulated", "accuracy_int8", "agreement_with_simulation")]
    same = "same bits" if row["same_in_new_process"] else "DIFFERS"
    return [short(row["model"]), str(row["threads"]), *times, *gains, *shares, same]


INT8 = Layout(
    "W8/A8 on the CPU",
    ("model", "threads", "float32, ms", "int8, ms", "speed-up", "of smallest", "accuracy: float32", "simulated", "int8", "agree", "loaded again"),
    _int8,
)


def _agreement(measurement: Measurement) -> list[list[str]]:
    lines = []
    for row in measurement.rows:
        counts = [str(row["images"] if "images" in row else row["batch_size"]), str(row["seeds"])]
        figures = [per_cent(row["same_patches"], 1), f"{row['loss']:.3f}", per_cent(row["agreement"], 1)]
        lines.append([row["method"].replace("smi", "SMI").replace("pri", "PRI"), row["side"], *counts, *figures])
    return lines


AGREEMENT = Layout(
    "Agreement of the engines",
    ("method", "engine", "images", "seeds", "same patches as the reference in float32", "final loss", "teacher agrees"),
    _agreement,
)


def _cpu_attention(measurement: Measurement) -> list[list[str]]:
    sides, about = {side: measurement.side(side) for side in CPU_SIDES}, measurement.about
    shape = f"{about['tokens']} tokens, batch {about['batch']}, {about['heads']} heads of {about['width']}"
    times = [f"{row['ms'][1]:.2f} ({row['least_ms']:.2f})" if row else "" for row in sides.values()]
    mine = [row for side, row in sides.items() if side in CPU_OURS]
    gains = [f"{row['over_sdpa']:.2f}x ({row['least_over_sdpa']:.2f}x)" if row else "" for row in mine]
    return [[shape, about["dtype"], str(about["threads"]), *times, *gains]]


CPU_ATTENTION = Layout(
    "Attention on the CPU",
    ("median (smallest)", "dtype", "threads", *(f"{side}, ms" for side in CPU_SIDES), *(f"{side} over sdpa" for side in CPU_OURS)),
    _cpu_attention,
)


def _demo(measurement: Measurement) -> list[list[str]]:
    forms = {
        "sparsity": "{:.0%}", "seconds": "{:.1f}", "images_per_second": "{:.1f}", "speedup": "{:#.3g}x", "flops_speedup": "{:#.3g}x",
        "agreement": "{:.1%}", "w4a8": "{:.1%}", "transfer": "{:.1%}",
    }  # fmt: skip
    lines = []
    for row in measurement.rows:
        cells = [form.format(row[key]).replace("%", " %") if key in row else "" for key, form in forms.items()]
        lines.append([RANDOM.get(row["method"], row["method"]), *cells])
    return lines


DEMO = Layout(
    "The demo",
    ("method", "sparsity", "seconds", "images/s", "speed-up", "FLOPs predict", "teacher agrees with the label", "W4/A8", "student"),
    _demo,
)


def _claims(measurement: Measurement) -> list[list[str]]:
    model = measurement.about["model"]
    vit, lines = vit_of(model), []
    schedules = {m: make_schedule(m.name, vit.num_patches, ITERATIONS, **m.options) for m in (DENSE, *CLAIMED)}
    flops = {method: cost.image_flops(vit, schedule, cls_only=True) for method, schedule in schedules.items()}
    for method in CLAIMED:
        claim = 10.0 if method == PRI7 else OVER_DENSE[TITLES[model]]
        cells = []
        for side in ALL_SIDES:
            found = [row["over_dense"] for row in measurement.rows if (row["side"], row["method"]) == (side, method.title)]
            cells.append(_held(found[-1], claim) if found else "not measured")
        lines.append([f"{short(model)} {method.title}", f"{claim:.2f}x", f"{flops[DENSE] / flops[method]:.2f}x", *cells])
    return lines


def _held(over: Sequence[float], claim: float) -> str:
    low, median, high = over
    return f"{median:.2f}x ({low:.2f}-{high:.2f}): {'pass' if median >= claim else 'fail'}"


CLAIMS = Layout("The published speed", ("images per second over dense", "published", "FLOPs allow", *ALL_SIDES), _claims)


def _method(measurement: Measurement) -> list[list[str]]:
    lines = []
    for row in measurement.rows:
        gains = [f"{row[key]:.2f}x" for key in ("speedup", "flops_speedup")]
        lines.append([f"{short(row['model'])} {row['method']}", row["engine"], f"{row['seconds_per_image']:.3f}", *gains])
    return lines


METHOD = Layout("Whole runs of 80 iterations by the reference engine", ("method", "engine", "seconds/image", "over dense", "FLOPs predict"), _method)


def _fuzz(measurement: Measurement) -> list[list[str]]:
    lines = []
    for row in measurement.rows:
        refused, found = row["outcomes"].get("refused", 0), len(row["findings"])
        others = row["cases"] - refused - row["outcomes"].get("finding", 0)
        about = [row["what"], f"{row['cases']:,}", str(len(row["parts"])), str(row["seed"])]
        lines.append(
            [*about, f"{row['seconds'] / 60:.0f}", per_cent(refused / max(1, row["cases"])), per_cent(others / max(1, row["cases"])), str(found)]
        )
    return lines


FUZZ = Layout(
    "Fuzzing",
    ("what", "cases", "kinds", "seed", "minutes of the campaign", "refused in a sentence", "computed or read", "findings"),
    _fuzz,
)


def fuzz(rows: Sequence[dict]) -> list[Table]:
    """Campaigns of random models, settings and damaged files."""
    return FUZZ.tables(current(rows, "fuzz"))


def int8(rows: Sequence[dict]) -> list[Table]:
    """The deployable W8/A8 model beside float32."""
    return INT8.tables(current(rows, "int8"))


def agreement(rows: Sequence[dict]) -> list[Table]:
    """Whole runs by both engines: retained patches, loss, recognition."""
    return AGREEMENT.tables(current(rows, "agreement"))


def cpu_attention(rows: Sequence[dict]) -> list[Table]:
    """Attention on the CPU beside PyTorch's own."""
    return CPU_ATTENTION.tables(current(rows, "cpu_attention"))


def demo(rows: Sequence[dict]) -> list[Table]:
    """`make demo`: every method on the embedded digits teacher."""
    return [DEMO.table([found], _demo_title(found.about)) for found in current(rows, "demo")]


def claims(rows: Sequence[dict]) -> list[Table]:
    """The published ratios to dense inversion beside those of each side to its own dense, and whether they hold there."""
    return CLAIMS.tables(current(rows, "claims"))


def _demo_title(row: dict) -> str:
    title = "{images} images of each method by the {engine} engine in {dtype}, {iterations} iterations, batches of {batch_size} trajectories, "
    title += "students of {transfer_steps} steps"
    seconds = round(row.get("demo_seconds", 0))
    return title.format(**row) + (f", {seconds // 60} min {seconds % 60} s in all" if seconds else "")
