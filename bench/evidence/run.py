"""The published tables in our own measure, on real test images: what each method's images cost and what they are worth.

    python -m bench.evidence --data digits --seeds 3                      the embedded teacher
    python -m bench.evidence --data cifar10 --teacher DIR --seeds 2       a teacher of smi.teachers.train_cifar10; SMI_CIFAR10 names its data
    python -m bench.evidence --data digits --seeds 3 --check              exit code 1 where a floor is not reached

Rows: Gaussian noise, dense, PSAQ-ViT, SMI, PRI v = 2, 4, 7, real images. Columns: seconds and FLOPs for the same number of images, teacher agreement,
accuracy of the quantised teacher, and of students: a copy of the teacher with its last blocks fresh, a fresh small one, and one whose trunk learned
other classes and whose head alone learns. Mean and deviation over seeds; learning curves against steps and seconds are in the cells.

Restartable: images and finished columns are kept in --folder, and the same command goes on from there. --jobs processes of --threads threads work
side by side, each on a method and a seed; the seconds that the images took are those of the processor, which other processes do not add to.
When all is done a row for each method is appended to bench/results/<device>.jsonl.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import torch

from smi.errors import InputError, RunError
from smi.files import write_json

from ..measuring.record import append, environment, results_file
from ..tables.terminal import print_table
from . import one_method_and_seed as cells
from .floors import failures

FOLDER = Path("out/evidence")
COUNTS = ("seeds", "jobs", "threads", "images", "iterations", "batch_size", "student_batch", "test_images")
COUNTS += ("copy_steps", "small_steps", "trunk_steps", "trunk_learning")


@dataclass(frozen=True)
class Config:
    """What decides the numbers; folders of another one are not mixed with it."""

    data: str
    teacher: str
    images: int
    iterations: int
    engine: str  # that makes the images; PSAQ-ViT's loss always needs the reference
    batch_size: int
    tv_weight: float
    copy_steps: int
    small_steps: int
    trunk_steps: int  # of its head
    trunk_learning: int  # steps in which it learns the other classes
    fresh_blocks: int
    student_batch: int
    test_images: int | None  # of which accuracy is measured; None: all
    threads: int


def make_config(given: argparse.Namespace) -> Config:
    """The options as they were given, the others as the data needs them."""
    if given.data == "cifar10" and given.teacher is None:
        raise InputError("cifar10 needs a teacher: pass the folder that smi.teachers.train_cifar10 wrote as --teacher")
    for name in COUNTS:
        if (value := getattr(given, name)) is not None and value < 1:
            raise InputError(f"{name.replace('_', '-')} must be at least 1, got {value}")
    cifar = given.data == "cifar10"
    return Config(
        data=given.data,
        teacher=given.teacher or "digits",
        images=given.images,
        iterations=given.iterations,
        engine=given.engine,
        batch_size=given.batch_size,
        tv_weight=given.tv_weight,
        copy_steps=given.copy_steps,
        small_steps=given.small_steps,
        trunk_steps=given.trunk_steps,
        trunk_learning=given.trunk_learning,
        fresh_blocks=(4 if cifar else 2) if given.fresh_blocks is None else given.fresh_blocks,
        student_batch=given.student_batch,
        test_images=given.test_images or (2000 if cifar else None),
        threads=given.threads,
    )


def open_folder(path: Path, config: Config, force: bool) -> bool:
    """Remember what the folder is of; whether all its cells are of these settings. Raises InputError where they are not, unless forced."""
    path.mkdir(parents=True, exist_ok=True)
    about, wanted = path / "config.json", asdict(config)
    begun = [cell.parent for cell in path.glob("seed*/*/cell.json")]  # none: an earlier command was refused
    known = json.loads(about.read_text()) if begun and about.exists() else wanted
    mixed = known.pop("mixed", False)
    if (mixed or known != wanted) and not force:
        raise InputError(f"{path} holds evidence of other settings: choose another --folder, or pass --force to go on in it")
    if known != wanted:
        mixed = True
        for cell in begun:  # what is finished stays, students half way with other settings cannot go on
            finished = json.loads((cell / "cell.json").read_text())
            for name in cells.STUDENTS:
                if name not in finished:
                    shutil.rmtree(cell / name, ignore_errors=True)
    write_json(about, wanted | ({"mixed": True} if mixed else {}))
    return not mixed


def run(config: Config, folder: Path, seeds: int, rows: list[str], columns: list[str], jobs: int) -> None:
    """Everything that is not yet in the folder; the longest cells of a seed first, so that no process waits long for the last."""
    todo = [(config, folder, row, seed, columns) for seed in range(seeds) for row in sorted(rows, key=cells.LONGEST_FIRST.index)]
    if jobs == 1:
        for cell in todo:
            cells.work(*cell)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_end_with_parent) as pool:
        waiting = [pool.submit(cells.work, *cell) for cell in todo]
        try:
            for done in as_completed(waiting):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what runs ends with its cell, what waits does not begin
            raise


def _end_with_parent() -> None:
    """Workers whose parent was killed would go on beside those of the next start."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def collect(folder: Path, seeds: int, rows: list[str]) -> list[dict]:
    """One row a method: the values of every column by seed."""
    found = []
    for row in rows:
        made = [cells.read(folder, row, seed) for seed in range(seeds)]
        columns = [name for name in cells.COLUMNS if all(isinstance(cell.get(name), int | float) for cell in made)]
        found.append({"method": row, **{name: [cell[name] for cell in made] for name in columns}})
    dense = [cells.read(folder, "dense", seed).get("seconds") for seed in range(seeds)]
    for row in found:
        if None not in dense and "seconds" in row and row["method"] not in ("gaussian", "real"):  # which cost no iterations
            row["speedup"] = [of_dense / mine for of_dense, mine in zip(dense, row["seconds"], strict=True)]
    return found


def show(config: Config, found: list[dict], seeds: int) -> None:
    """The table, mean and deviation over seeds."""
    columns = [name for name in ("seconds", "speedup", *cells.COLUMNS[1:]) if any(name in row for row in found)]
    lines = [[cells.TITLES[row["method"]], *(_cell(name, row.get(name)) for name in columns)] for row in found]
    title = (
        f"{config.data}, {config.images} images, {config.iterations} iterations, batch {config.batch_size}, a_tv {config.tv_weight:g}, {seeds} seeds"
    )
    print_table(title, ["method", *(cells.HEADINGS[name] for name in columns)], lines)


def _cell(name: str, values: list[float] | None) -> str:
    if values is None:
        return ""
    scale, digits = cells.UNITS.get(name, (100.0, 1))
    spread = f" ± {statistics.stdev(values) * scale:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values) * scale:.{digits}f}{spread}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--teacher", help="folder of a trained model; the embedded teacher for digits when absent")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=cells.ROWS, default=list(cells.ROWS))
    parser.add_argument("--columns", nargs="+", choices=cells.JUDGED, default=list(cells.JUDGED), help="what is found out of the images")
    parser.add_argument("--images", type=int, default=252, help="finished images of each method (whole trajectories for v = 2, 4, 7)")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--engine", choices=("reference", "fused"), default="reference", help="that makes the images")
    parser.add_argument("--batch-size", type=int, default=63, help="trajectories at a time, the same for every method")
    parser.add_argument("--tv-weight", type=float, default=5e-3)
    parser.add_argument("--copy-steps", type=int, default=400)
    parser.add_argument("--small-steps", type=int, default=2000)
    parser.add_argument("--trunk-steps", type=int, default=200)
    parser.add_argument("--trunk-learning", type=int, default=600)
    parser.add_argument("--fresh-blocks", type=int, help="last blocks of the copy that start afresh")
    parser.add_argument("--student-batch", type=int, default=32)
    parser.add_argument("--test-images", type=int, help="real test images; all of digits, 2000 of CIFAR-10 when absent")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes side by side; the cores, at most 8, when absent")
    parser.add_argument("--folder", type=Path, help="out/evidence/<data> when absent")
    parser.add_argument("--force", action="store_true", help="go on in a folder of other settings; such tables are shown, never appended")
    parser.add_argument("--no-append", action="store_true", help="leave bench/results as it is")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a floor is not reached")
    given = parser.parse_args(arguments)
    try:
        return _main(given)
    except InputError as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 1


def _main(given: argparse.Namespace) -> int:
    config, folder = make_config(given), given.folder or FOLDER / given.data
    pure = open_folder(folder, config, given.force)
    run(config, folder, given.seeds, given.rows, given.columns, given.jobs)
    found = collect(folder, given.seeds, given.rows)
    show(config, found, given.seeds)
    if pure and not given.no_append:
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
    about.pop("run", None)  # of the suites
    of = {**asdict(config), "teacher": Path(config.teacher).name}  # where it lies is nobody else's matter
    append(results_file(about["device"]), [{"kind": "evidence", **row, "config": of, **about} for row in fresh])
    write_json(written, [*known, *fresh])


if __name__ == "__main__":
    sys.exit(main())
