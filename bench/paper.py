"""The published tables with three columns, published, baseline here, ours here, from the newest run of the suites on this device.

    python -m bench.paper                        print; write bench/results/paper.md, speedup.png and tokens.png
    python -m bench.paper --device nvidia-h200   from another device's rows
    python -m bench.paper --all-runs             the newest rows of every case, whichever run they are from

What the rows do not hold is named as missing; run `python -m bench.run` for it. paper.md says which of these commands made it. Of the other pictures
in bench/results, demo.png is the one that `make demo` writes to out/demo, and evidence-small.png is report/small-seconds.png of
`smi report out/evidence/digits` (after `python -m bench.evidence --data digits`).
"""

import argparse
import sys
from pathlib import Path

from smi.console import print_table
from smi.environment import info_table
from smi.files import write_text

from .measuring import record
from .tables.paper import as_markdown, paper_tables, suite_rows
from .tables.plots import plot_speedups, plot_tokens
from .tables.results import Results
from .tables.table import MISSING


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="name of its result file, without .jsonl; without it this machine's")
    parser.add_argument("--all-runs", action="store_true", help="the newest rows of every case")
    parser.add_argument("--output", type=Path, default=record.RESULTS, help="folder of paper.md and the plots")
    options = parser.parse_args(arguments)
    device = options.device or record.results_file(info_table()["devices"][-1]["name"]).stem
    rows = suite_rows(device, options.all_runs)
    if not rows:
        print(f"{record.RESULTS / device}.jsonl holds no run of the suites: python -m bench.run makes one", file=sys.stderr)
        return 1
    results = Results(rows)
    tables = paper_tables(results)
    for table in tables:
        print_table(table.title, table.columns, table.lines)
    options.output.mkdir(parents=True, exist_ok=True)
    plots = [plot_speedups(results, options.output / "speedup.png"), plot_tokens(results, options.output / "tokens.png")]
    write_text(options.output / "paper.md", as_markdown(results, device, options.all_runs, [plot.stem for plot in plots if plot]))
    missing = sum(cell == MISSING for table in tables for line in table.lines for cell in line)
    print(f"wrote {options.output / 'paper.md'}" + (f"; {missing} figures are missing: python -m bench.run measures them" if missing else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
