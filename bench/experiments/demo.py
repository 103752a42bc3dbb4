"""The demo as rows of the result files: every method on the embedded digits teacher, one row a method.

    python -m bench.experiments.demo               run the demo into out/demo (three minutes) and append its rows
    python -m bench.experiments.demo out/demo      append those of a finished demo of this machine and this code

`make tables` then renders the demo's table. Its picture is out/demo/demo.png.
"""

import argparse
import sys
import time
from pathlib import Path

from smi.console import print_table
from smi.demo import demo
from smi.errors import InputError
from smi.report.several_runs import read_demo

from ..tables.experiments import DEMO
from ..tables.rows import measurements
from .result_rows import append_to_results, with_environment

FOLDER = Path("out/demo")
SETTINGS = ("model", "iterations", "batch_size", "tv_weight", "engine", "dtype", "seed")


def rows_of(made: dict, seconds: float | None = None) -> list[dict]:
    """The rows of a demo's table, demo.json. seconds: that the whole demo took, where that is known."""
    settings = made["settings"]
    about = {key: settings[key] for key in SETTINGS}
    about |= {"transfer_steps": made.get("downstream", {}).get("transfer", {}).get("steps", 0), "full": made.get("full")}
    about |= {} if seconds is None else {"demo_seconds": seconds}
    rows = [about | {key: row[key] for key in row if key != "folder"} for row in made["table"]]
    rows = with_environment("demo", rows, settings["device"])
    return rows if seconds is not None else [row | {"time": settings["date"]} for row in rows]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of a finished demo; without it the demo runs")
    parser.add_argument("--no-append", action="store_true", help="leave bench/results as it is")
    given = parser.parse_args(arguments)
    try:
        rows = _finished(given.folder) if given.folder else _run()
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    if not given.no_append:
        append_to_results(rows)
    print_table("the demo", DEMO.columns, [line for found in measurements(rows) for line in DEMO.lines(found)])
    return 0


def _run() -> list[dict]:
    began = time.perf_counter()
    made = demo(FOLDER, force=True)
    return rows_of(made, time.perf_counter() - began)


def _finished(folder: Path) -> list[dict]:
    made = read_demo(folder)
    if made is None:
        raise InputError(f"{folder} holds no demo.json: smi demo writes it")
    return rows_of(made)


if __name__ == "__main__":
    sys.exit(main())
