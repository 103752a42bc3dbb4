"""The regression gates: exit code 1, and a readable table, when something got worse.

    python -m bench.check                    all gates (make bench-check)
    python -m bench.check --quick            all, but of the ratios only those to `eager`, without torch.compile
    python -m bench.check --exact            only what is exact: FLOPs, bytes kept for backward, the compile gate
    python -m bench.check --ratios           only the ratios, on a GPU the times
    python -m bench.check --full             the compile gate of all kernels (tens of minutes) instead of a cheap one
    python -m bench.check --update           record a new baseline: look at the differences first
    python -m bench.check --against main     ratios against another commit, measured here and now in a worktree: for machines without a baseline
    python -m bench.check --repeat 20        repeat the ratios alone and count the alarms
    python -m bench.check --slow 1.3         plant a regression of 30 %: every ratio must be reported

Baselines are in bench/baseline/: exact.json for all machines, and ratios for a class of processors. On a GPU the times of our steps are held against
the committed rows of the same device instead (bench/results/<device>.jsonl). bench/gates.py says why the ratios are stable on a busy machine.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from smi.kernels.timing import Quantiles

from .cases import suites
from .files import write_json
from .gates import ratios as gates
from .measuring import inversions, record
from .tables.terminal import print_table

ROOT = Path(__file__).parents[1]
BASELINE = Path(__file__).parent / "baseline"
CHEAP_COMPILE = ("layer_norm",)  # operations whose kernels compile in a minute
GPU_CASES = 4  # the first ones of the suite
GPU_SECONDS = 20.0  # each
# Runs a checkout's own bench and smi, whatever is installed: an editable install would bring in the other checkout's kernels.
FROM_CHECKOUT = """\
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path.insert(0, {root!r})
sys.argv = ["bench.check", *{arguments!r}]
runpy.run_module("bench.check", run_name="__main__")
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--exact", action="store_true", help="only the exact gates")
    only.add_argument("--ratios", action="store_true", help="only the ratios, on a GPU the times")
    parser.add_argument("--quick", action="store_true", help="without torch.compile")
    parser.add_argument("--full", action="store_true", help="compile all kernels")
    parser.add_argument("--update", action="store_true", help="record a new baseline")
    parser.add_argument("--against", metavar="COMMIT", help="take the baseline of the ratios from another commit, measured now")
    parser.add_argument("--repeat", type=int, metavar="N", help="repeat the ratio check and count the alarms")
    parser.add_argument("--slow", type=float, default=1.0, metavar="FACTOR", help="make our side slower, to see it reported")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="folder of the baselines")
    options = parser.parse_args(arguments)
    if options.exact and (options.repeat or options.against):
        parser.error("--repeat and --against are about ratios: leave out --exact")
    failed = 0
    if not options.ratios and not options.repeat:
        failed += check_exact(options.baseline / "exact.json", options.update)
        failed += check_compiled(options.full)
    if not options.exact:
        failed += check_gpu_times() if torch.cuda.is_available() else check_ratios(options, compiled=not (options.quick or options.against))
    print("nothing regressed" if not failed else f"{failed} regressed")
    return 1 if failed else 0


def check_exact(path: Path, update: bool) -> int:
    """Hold FLOPs and kept bytes against the file; how many differ."""
    now = {"flops": gates.exact_flops(), "kept_bytes": gates.exact_kept_bytes()}
    before = json.loads(path.read_text()) if path.exists() else {}
    if update:
        write_json(path, origin() | now)
        print(f"wrote {path}")
        return 0
    changed = differences(now, before)
    if changed:
        print_table("exact numbers that are not as committed", ["what", "committed", "now"], changed)
        print("if this is meant, run python -m bench.check --update and commit the file")
    else:
        print(f"exact: {sum(map(len, now.values()))} numbers are as in {path.name}")
    return len(changed)


def differences(now: dict[str, dict], before: dict) -> list[tuple[str, object, object]]:
    """(what, committed, now) of every number that changed, came or went. What an engine keeps where it runs in versions that only one of the two
    machines has is no difference, but named."""
    found = []
    for kind, numbers in now.items():
        committed = before.get(kind, {})
        for name in sorted(numbers.keys() | committed.keys()):
            if kind == "kept_bytes" and committed and (name in numbers) != (name in committed) and "fused" in name:
                print(f"kept_bytes: {name}: only {'here' if name in numbers else 'in the committed file'}, not compared")
            elif numbers.get(name) != committed.get(name):
                found.append((f"{kind}: {name}", committed.get(name, "-"), numbers.get(name, "-")))
    return found


def check_compiled(full: bool) -> int:
    """The compile gate in a process of its own, in which Triton compiles instead of interpreting; 1 if it fails."""
    if importlib.util.find_spec("triton") is None:
        print("compile gate: not run, triton is not installed")
        return 0
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gates.compiled", "--check", *([] if full else ["--only", *CHEAP_COMPILE])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(f"compile gate: {(done.stdout.strip() or done.stderr.strip()[-2000:])}")
    return int(done.returncode != 0)


def origin() -> dict:
    """Where a baseline comes from."""
    about = record.environment(torch.device("cpu"))
    return {name: about[name] for name in ("commit", "dirty", "device", "system", "python", "torch", "triton", "timm", "time")}


def check_ratios(options: argparse.Namespace, compiled: bool) -> int:
    """Hold ours/eager and ours/compiled against the baseline of this class of processors, once or often; how many regressed."""
    torch.set_num_threads(1)
    path = options.baseline / f"{record.device_class(torch.device('cpu'))}.json"
    if options.update:
        measured = measure_ratios({}, compiled, options.slow)
        write_json(path, origin() | {"cases": as_baseline(measured)})
        print(f"wrote {path}")
        show_ratios(verdicts(measured))
        return 0
    before = ratios_at(options.against) if options.against else json.loads(path.read_text())["cases"] if path.exists() else {}
    if not before:
        print(f"ratios: there is no baseline {path.name}, nothing to hold them against: --update records one, --against measures another commit")
    if not options.repeat:
        found = verdicts(measure_ratios(before, compiled, options.slow))
        show_ratios(found)
        return sum(verdict.regressed for verdict in found)
    return repeat(options, before, compiled)


def repeat(options: argparse.Namespace, before: dict, compiled: bool) -> int:
    """The check many times; how many of the repetitions raised an alarm."""
    alarms = 0
    for number in range(1, options.repeat + 1):
        found = verdicts(measure_ratios(before, compiled, options.slow))
        names = [verdict.name for verdict in found if verdict.regressed]
        alarms += bool(names)
        load = os.getloadavg()[0]
        ratios = ", ".join(f"{verdict.now.median:.2f}" for verdict in found)
        print(f"{number}/{options.repeat}: load {load:.1f}, ratios {ratios}: {'ALARM ' + '; '.join(names) if names else 'no alarm'}", flush=True)
    print(f"{alarms} alarms in {options.repeat} repetitions")
    return alarms


def measure_ratios(before: dict, compiled: bool, slow: float) -> dict[str, tuple[gates.Sides, list[gates.Verdict]]]:
    """For every case its sides and the verdict about each other side."""
    measured = {}
    for case in gates.RATIO_CASES:
        old = before.get(case.name, {})
        others = tuple(other for other in case.others if compiled or other != "compiled")
        sides = gates.sides_of(case, others, old.get("dtype", "auto"), old.get("variant"))
        found = []
        for other in others:
            band = old.get("over", {}).get(other)

            def sample(rounds: int, other=other, sides=sides) -> list[float]:
                return gates.speedups(sides.steps["ours"], sides.steps[other], rounds, slow=slow)

            found.append(gates.judge(f"{case.name}: {other}", sample, Quantiles(*band) if band else None))
        measured[case.name] = sides, found
    return measured


def verdicts(measured: dict) -> list[gates.Verdict]:
    return [verdict for _, found in measured.values() for verdict in found]


def as_baseline(measured: dict) -> dict:
    """What a baseline file keeps of a measurement."""
    return {
        name: {
            "dtype": sides.dtype,
            "variant": sides.variant,
            "engine": sides.steps["ours"].resolved,
            "over": {verdict.name.rsplit(": ", 1)[1]: list(verdict.now) for verdict in found},
        }
        for name, (sides, found) in measured.items()
    }


def ratios_at(commit: str) -> dict:
    """The ratios of another commit to its own baselines, measured now in a worktree of it."""
    with tempfile.TemporaryDirectory() as folder:
        tree, results = Path(folder) / "tree", Path(folder) / "baseline"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), commit], check=True, capture_output=True)
        try:
            code = FROM_CHECKOUT.format(root=str(tree), arguments=["--ratios", "--quick", "--update", "--baseline", str(results)])
            done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"the ratios of {commit} could not be measured: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
            (made,) = results.glob("cpu-*.json")
            return json.loads(made.read_text())["cases"]
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=False, capture_output=True)


def show_ratios(found: list[gates.Verdict]) -> None:
    def band(quantiles: Quantiles | None) -> str:
        return f"{quantiles.median:.2f} ({quantiles.low:.2f}-{quantiles.high:.2f})" if quantiles else "-"

    rows = [[v.name, band(v.before), band(v.now), "REGRESSED" if v.regressed else "ok" if v.before else "new"] for v in found]
    print_table("times faster than the other side, processor time of one thread", ["step", "baseline", "now", ""], rows)


def check_gpu_times() -> int:
    """Hold the times of our steps against the newest committed rows of this GPU; how many are slower."""
    device = torch.device("cuda", torch.cuda.current_device())
    rows = record.read(record.results_file(torch.cuda.get_device_name(device)))
    rates = inversions.product_rates(device)
    lines, failed = [], 0
    for case in suites.on_gpu().steps[:GPU_CASES]:
        key = {"kind": "step", "case": case.name, "side": "ours", "dirty": False}
        committed = [row for row in rows if "ms" in row and all(row.get(name) == value for name, value in key.items())]
        (now,) = [row for row in inversions.measure_step(case, device, GPU_SECONDS, rates) if row["side"] == "ours" and "ms" in row]
        worse = bool(committed) and gates.slower(Quantiles(*now["ms"]), Quantiles(*committed[-1]["ms"]))
        failed += worse
        before = f"{committed[-1]['ms'][1]:.2f}" if committed else "-"
        lines.append([case.name, before, f"{now['ms'][1]:.2f}", "REGRESSED" if worse else "ok" if committed else "new"])
    print_table("our steps on this GPU, ms", ["step", "committed", "now", ""], lines)
    return failed


if __name__ == "__main__":
    sys.exit(main())
