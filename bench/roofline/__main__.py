"""The modelled time of one step on an H200, kernel by kernel. Needs no GPU; kernels are compiled, and Triton's cache keeps them.

python -m bench.roofline                       print the tables of the committed cases
python -m bench.roofline --check               exit 1 if a step is longer than it may be
python -m bench.roofline --write               write the tables to docs/gpu-model.md
python -m bench.roofline --model deit_small_patch16_224 --patches 98 --batch 18
"""

import argparse
import os
import sys
import warnings

from smi.console import print_table
from smi.files import write_text

from . import report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if a step is longer than it may be")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/gpu-model.md")
    parser.add_argument("--model", help="timm's name of a model, instead of the committed cases")
    parser.add_argument("--patches", type=int, default=196, help="active patches of an image")
    parser.add_argument("--batch", type=int, default=128, help="images")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: interpreted kernels are not compiled, unset it")
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    cases = [report.Case(options.model, options.model, options.patches, options.batch, float("inf"))] if options.model else report.CASES
    parts, failed = [], False
    for case in cases:
        found = report.estimates(case)
        title, lines = report.title_of(case, found), report.lines_of(found)
        print_table(title, report.COLUMNS, lines)
        parts.append(report.as_markdown(title, lines))
        if report.milliseconds(found) > case.most:
            failed = True
            print(f"longer than the {case.most} ms that it may take")
    if options.write:
        write_text(report.DOCUMENT, report.written(report.DOCUMENT.read_text(), parts))
    return int(options.check and failed)


if __name__ == "__main__":
    sys.exit(main())
