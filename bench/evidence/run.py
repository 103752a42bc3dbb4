"""The published tables in our own measure, on real test images: what each method's images cost and what they are worth.

    python -m bench.evidence --data digits --seeds 3                      the embedded teacher
    python -m bench.evidence --data cifar10 --teacher DIR --seeds 2       a teacher of smi.teachers.train_cifar10; SMI_CIFAR10 names its data
    python -m bench.evidence --data imagenet --iterations 20 --seeds 3    a DeiT-Tiny; --path or SMI_IMAGENET names its folder
    python -m bench.evidence --data digits --seeds 3 --check              exit code 1 where a floor is not reached

Rows: Gaussian noise, dense, PSAQ-ViT, SMI, PRI v = 2, 4, 7, real images. Columns: seconds and FLOPs for the same number of images, teacher agreement,
accuracy of the quantised teacher, and of students: a copy of the teacher with its last blocks re-initialised, a small one, and a linear probe on a
trunk that learned other classes. On ImageNet the teacher is quantised under both recipes, and students are left out unless asked for. Mean and
deviation over seeds; learning curves against steps and seconds are in seedN/ROW/cell.json.

Restartable: images and finished columns are kept in --folder, and the same command goes on from there. --jobs processes of --threads threads work
side by side, each on a method and a seed. The seconds of the images are processor time, to which other processes add nothing.
When all is done a row for each method is appended to bench/results/<device>.jsonl.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import takewhile
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import torch

from smi.console import print_table
from smi.datasets import VARIABLES
from smi.errors import InputError, RunError
from smi.files import write_json
from smi.inversion.methods import REAL

from ..measuring.record import append, environment, results_file
from .columns import COLUMNS, DEFAULT_COLUMNS, HEADINGS, HOW, IMAGENET_COLUMNS, JUDGED_COLUMNS, LONGEST_FIRST, ROWS, STUDENTS, UNITS
from .compare import interval, paired
from .config import Config, make_config
from .floors import failures
from .one_method_and_seed import find_out, read_columns

FOLDER = Path("out/evidence")


def open_folder(path: Path, config: Config, force: bool) -> bool:
    """Write the settings into the folder; whether all that is in it is of them. Raises InputError where it is not, unless forced."""
    path.mkdir(parents=True, exist_ok=True)
    about, wanted = path / "config.json", asdict(config)
    begun = [file.parent for file in path.glob("seed*/*/cell.json")]  # none: an earlier command was refused
    known = json.loads(about.read_text()) if begun and about.exists() else wanted
    mixed = known.pop("mixed", False)
    if (mixed or known != wanted) and not force:
        raise InputError(f"{path} holds evidence of other settings: choose another --folder, or pass --force to go on in it")
    if known != wanted:
        mixed = True
        for made in begun:  # what is finished stays, students half way with other settings cannot go on
            finished = json.loads((made / "cell.json").read_text())
            for name in STUDENTS:
                if name not in finished:
                    shutil.rmtree(made / name, ignore_errors=True)
    write_json(about, wanted | ({"mixed": True} if mixed else {}))
    return not mixed


def run(config: Config, folder: Path, seeds: int, rows: list[str], columns: list[str], jobs: int) -> None:
    """Find out all that is not yet in the folder; the longest methods of a seed first, so that no process waits long for the last."""
    todo = [(config, folder, row, seed, columns) for seed in range(seeds) for row in sorted(rows, key=LONGEST_FIRST.index)]
    if jobs == 1:
        for arguments in todo:
            find_out(*arguments)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        waiting = [pool.submit(find_out, *arguments) for arguments in todo]
        try:
            for done in as_completed(waiting):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what runs comes to its end, what waits does not begin
            raise


def _end_with_parent() -> None:
    """Workers whose parent was killed would go on beside those of the next start."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def collect(folder: Path, seeds: int, rows: list[str]) -> list[dict]:
    """One row a method: the values of every column by seed. A column is left out where it is not known for all seeds, an accuracy of a quantised
    teacher where it is not known for the first."""
    found = []
    for row in rows:
        by_seed = [read_columns(folder, row, seed) for seed in range(seeds)]
        known = {name: _of_first(name, by_seed) for name in COLUMNS}
        found.append({"method": row, **{name: values for name, values in known.items() if len(values) == seeds or (name in HOW and values)}})
    dense = [read_columns(folder, "dense", seed).get("seconds") for seed in range(seeds)]
    for row in found:
        if None not in dense and "seconds" in row and ROWS[row["method"]].optimised:
            row["speedup"] = [of_dense / mine for of_dense, mine in zip(dense, row["seconds"], strict=True)]
    for row in found:
        row.update(compared(folder, row["method"], seeds))
    return found


def _of_first(name: str, by_seed: list[dict]) -> list:
    """The values of a column for the first seeds, as far as they are known."""
    return list(takewhile(lambda value: isinstance(value, int | float | str), (columns.get(name) for columns in by_seed)))


def compared(folder: Path, row: str, seeds: int) -> dict:
    """Intervals of a row's accuracies, and its differences to the row of real images, over the seeds for which they are known."""
    mine, real = ([read_columns(folder, name, seed) for seed in range(seeds)] for name in (row, REAL.key))
    found: dict[str, dict] = {"interval": {}, "paired": {}}
    for name in ("full", *HOW):
        right, others = (_of_first(f"{name}_right", each) for each in (mine, real))
        if not right:
            continue
        count = mine[0]["test_images"]
        found["interval"][name] = interval(right, count)
        if len(others) >= len(right) and row != REAL.key:
            found["paired"][name] = paired(right, others[: len(right)], count)
    return {name: values for name, values in found.items() if values}


def show(config: Config, found: list[dict], seeds: int) -> None:
    """The table, mean and deviation over seeds."""
    columns = [name for name in ("seconds", "speedup", *COLUMNS[1:]) if any(name in row for row in found)]
    lines = [[ROWS[row["method"]].title, *(as_text(name, row.get(name)) for name in columns)] for row in found]
    title = (
        f"{config.data}, {config.images} images, {config.iterations} iterations, batch {config.batch_size}, a_tv {config.tv_weight:g}, {seeds} seeds"
    )
    print_table(title, ["method", *(HEADINGS[name] for name in columns)], lines)


def as_text(name: str, values: list[float] | None) -> str:
    """Mean and deviation of a column in its unit; nothing where it is not known."""
    if values is None:
        return ""
    scale, digits = UNITS.get(name, (100.0, 1))
    spread = f" ± {statistics.stdev(values) * scale:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values) * scale:.{digits}f}{spread}"


def options() -> argparse.ArgumentParser:
    """Of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "cifar10", "imagenet"), default="digits")
    parser.add_argument("--path", help="folder of ImageNet's Parquet files and teacher; SMI_IMAGENET when absent")
    parser.add_argument("--teacher", help="folder of a trained model, or ARCHITECTURE.safetensors; that of the data when absent")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--columns", nargs="+", choices=JUDGED_COLUMNS, help="what is found out of the images; those of the data when absent")
    parser.add_argument(
        "--images", type=int, help="finished images of each method; 252 (whole trajectories for v = 2, 4, 7), 32 of ImageNet when absent"
    )
    parser.add_argument("--iterations", type=int, help="200, 20 of ImageNet when absent")
    parser.add_argument("--engine", choices=("reference", "fused"), help="that makes the images; reference, fused for ImageNet when absent")
    parser.add_argument("--batch-size", type=int, help="trajectories at a time, the same for every method; 63, 32 of ImageNet when absent")
    parser.add_argument("--tv-weight", type=float, help="5e-3, 1e-4 of ImageNet when absent")
    parser.add_argument("--copy-steps", type=int, default=400)
    parser.add_argument("--small-steps", type=int, default=2000)
    parser.add_argument("--trunk-steps", type=int, default=200)
    parser.add_argument("--trunk-learning", type=int, default=600)
    parser.add_argument("--fresh-blocks", type=int, help="last blocks of the copy that are re-initialised")
    parser.add_argument("--student-batch", type=int, default=32)
    parser.add_argument("--test-images", type=int, help="real test images; all, 2000 of CIFAR-10 when absent")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes side by side; the cores, at most 8, when absent")
    parser.add_argument("--folder", type=Path, help="out/evidence/<data> when absent")
    parser.add_argument("--force", action="store_true", help="go on in a folder of other settings; such tables are shown, never appended")
    parser.add_argument("--no-append", action="store_true", help="leave bench/results as it is")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a floor is not reached")
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = options().parse_args(arguments)
    try:
        return _main(given)
    except InputError as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 1


def _main(given: argparse.Namespace) -> int:
    if given.path is not None:
        os.environ[VARIABLES["imagenet"]] = given.path  # which the processes beside this one inherit
    config = make_config(given)
    folder = given.folder or FOLDER / (f"imagenet-{config.iterations}" if given.data == "imagenet" else given.data)
    columns = given.columns or (IMAGENET_COLUMNS if given.data == "imagenet" else DEFAULT_COLUMNS)
    unmixed = open_folder(folder, config, given.force)
    run(config, folder, given.seeds, given.rows, list(columns), given.jobs)
    found = collect(folder, given.seeds, given.rows)
    show(config, found, given.seeds)
    if unmixed and not given.no_append:
        _append(config, folder / "appended.json", found)
    below = failures(found, config.data) if given.check else []
    for line in below:
        print(f"below its floor: {line}")
    return 1 if below else 0


def _append(config: Config, written: Path, found: list[dict]) -> None:
    """Rows that bench/results does not hold yet; `written` names those that it does."""
    known = json.loads(written.read_text()) if written.exists() else []
    fresh = [row for row in found if row not in known]
    if not fresh:
        return
    about = environment(torch.device("cpu"))
    of = {**asdict(config), "teacher": Path(config.teacher).name}  # where it lies is nobody else's matter
    append(results_file(about["device"]), [{"kind": "evidence", **row, "config": of, **about} for row in fresh])
    write_json(written, [*known, *fresh])


if __name__ == "__main__":
    sys.exit(main())
