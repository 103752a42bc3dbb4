"""Why do synthesised images calibrate DeiT-Tiny worse than real ones at W6/A6 under the published recipe, and what mends it?

    python -m bench.experiments.ranges --path DIR     a folder as `python -m bench.evidence --data imagenet` takes it; SMI_IMAGENET when absent

Each case calibrates with 32 images and is judged on the same validation images: images of more and more iterations (early stopping); percentile and
least-squares ranges; fewer images; a higher weight of total variation; noise added to the pixels; noise images beside; and, to find the place, PRI's
ranges with those of one kind of activation from the calibration with real images. A row holds the accuracy, its interval, the paired difference to
real images with ranges from the least to the greatest value, and the range of every activation.

Restartable: images (those that bench.evidence made are taken) and finished cases are kept in --folder. Rows are appended to
bench/results/<device>.jsonl when all cases are finished.
"""

import argparse
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

import smi
from smi.console import print_table
from smi.datasets import VARIABLES
from smi.files import write_json
from smi.models.vit import describe_weights
from smi.quantization.calibrate import Calibration
from smi.quantization.int8 import Int8ViT, products_saturate
from smi.quantization.model import Facts, Images, recognised
from smi.quantization.recipe import CALIBRATION_IMAGES, PUBLISHED, Recipe
from smi.quantization.simulate import SimulatedViT
from smi.random_streams import generator
from smi.surroundings import seeded

from ..evidence.compare import interval, paired, to_hex
from ..evidence.config import Config, make_config
from ..evidence.one_method_and_seed import EVALUATED_TOGETHER, folder_of, make_images
from ..evidence.run import FOLDER, open_folder, options
from ..evidence.teacher import real_data, teacher_of
from ..tables.ranges import POINTS, RANGES, RESIDUAL, WIDTHS, kind_of
from ..tables.rows import measurements
from .result_rows import append_to_results, with_environment

BITS, SEED, SHORT, LONG, TV = 6, 0, 20, 400, 1e-4
Inputs = dict[str, tuple[float, int]]


@dataclass(frozen=True)
class Case:
    """A calibration. The fields that change nothing have the defaults."""

    images: str  # a row of bench.evidence
    iterations: int = SHORT
    ranges: str = "minmax"
    percentile: float = 99.9
    count: int = CALIBRATION_IMAGES
    tv_weight: float = TV
    pixel_noise: float = 0.0  # standard deviation of what is added to the normalised pixels
    noise_images: int = 0  # of Gaussian noise, shown beside the others
    borrowed: str = ""  # kinds of activations, joined by " and ", whose ranges are those of real images


REAL = Case("real")
SETS = (REAL, Case("pri4"), Case("pri4", LONG), Case("psaq"))
CASES = (
    *SETS,
    *(Case("pri4", iterations) for iterations in (50, 100, 200)),
    *(replace(each, ranges="mse") for each in SETS),
    *(Case("pri4", LONG, borrowed=kind) for kind in (*POINTS, "embedding and residual sums")),
    *(replace(each, ranges="percentile") for each in (REAL, Case("pri4", LONG))),
    Case("pri4", LONG, count=8),
    Case("pri4", LONG, pixel_noise=0.5),
    Case("pri4", LONG, noise_images=CALIBRATION_IMAGES),
    Case("pri4", SHORT, tv_weight=5e-3),
)


def config_of(case: Case, test_images: int | None) -> Config:
    """That of `python -m bench.evidence --data imagenet`."""
    asked = {"data": "imagenet", "iterations": case.iterations, "tv-weight": case.tv_weight}
    given = options().parse_args([f"--{name}={value}" for name, value in asked.items()])
    return replace(make_config(given), test_images=test_images)


def images_of(case: Case, folder: Path) -> list[Images]:
    """What calibrates, made if need be."""
    config = config_of(case, None)
    of_weight = "" if case.tv_weight == TV else f"-tv-{case.tv_weight:g}"
    path = folder / f"imagenet-{case.iterations}{of_weight}"
    open_folder(path, config, force=False)
    make_images(config, path, case.images, SEED)
    images = smi.SparseImages.load(folder_of(path, case.images, SEED) / "images")[: case.count]
    draw = generator(SEED, "ranges")
    noise = torch.randn(images.patches.shape, generator=draw) * case.pixel_noise
    channels, (rows, columns), size = images.patches.shape[2], images.grid, images.patches.shape[3]
    other = torch.randn(case.noise_images, channels, rows * size, columns * size, generator=draw)
    return [(images.patches + noise, images.index), *([other] if case.noise_images else [])]


@cache
def calibrated(case: Case, folder: Path, config: Config) -> tuple[Facts, dict, Inputs]:
    """Facts, tensors and inputs of the quantised model, whatever the case borrows; made once."""
    recipe = Recipe(BITS, BITS, ranges=case.ranges, percentile=case.percentile, name=PUBLISHED)
    model = teacher_of(config.teacher)
    facts = Facts.of(describe_weights(model), recipe)
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibration = Calibration(model, facts, CALIBRATION_IMAGES)
        for images in images_of(case, folder):
            calibration.see(images)
        return facts, *calibration.result()


def as_ranges(inputs: Mapping[str, tuple[float, int]]) -> dict[str, list[float]]:
    """The least and the greatest value that the codes of each activation reach, to four digits."""
    return {name: [float(f"{(code - zero) * scale:.4g}") for code in (0, 2**BITS - 1)] for name, (scale, zero) in inputs.items()}


def judged(case: Case, folder: Path, config: Config) -> dict:
    """The row of a case, but for its difference to real images."""
    facts, tensors, inputs = calibrated(replace(case, borrowed=""), folder, config)
    if case.borrowed:
        real = calibrated(replace(REAL, ranges=case.ranges, percentile=case.percentile), folder, config)[2]
        inputs = {name: (real if kind_of(name) in case.borrowed.split(" and ") else inputs)[name] for name in inputs}
    model = (SimulatedViT if products_saturate() else Int8ViT)(facts, tensors, inputs)
    right = recognised(model, *real_data(config, "test"), EVALUATED_TOGETHER)
    about = {"model": facts.name, "widths": str(facts.recipe), "test_images": len(right), "seed": SEED}
    return {**asdict(case), **about, "accuracy": right.double().mean().item(), "right": to_hex(right), "point_ranges": as_ranges(inputs)}


def with_differences(rows: list[dict]) -> list[dict]:
    """Rows with their intervals and their differences to the first, real images."""
    real, count = rows[0]["right"], rows[0]["test_images"]
    return [{**row, "interval": interval([row["right"]], count), "paired": paired([row["right"]], [real], count)} for row in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="folder of ImageNet's Parquet files and teacher; SMI_IMAGENET when absent")
    parser.add_argument("--test-images", type=int, default=500, help="validation images to judge on")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of images and finished cases")
    parser.add_argument("--no-record", action="store_true", help="measure only, append nothing to the results")
    given = parser.parse_args(arguments)
    if given.path is not None:
        os.environ[VARIABLES["imagenet"]] = given.path
    torch.set_num_threads(1)
    config, path = config_of(REAL, given.test_images), given.folder / f"ranges-{given.test_images}.json"
    known = {json.dumps(row["case"]): row["found"] for row in json.loads(path.read_text())} if path.exists() else {}
    for case in CASES:
        name = json.dumps(asdict(case))
        if name not in known:
            known[name] = judged(case, given.folder, config)
            write_json(path, [{"case": json.loads(key), "found": found} for key, found in known.items()])
            print(f"{known[name]['accuracy']:.3f}  {name}", flush=True)
    rows = with_environment("ranges", with_differences([known[json.dumps(asdict(case))] for case in CASES]))
    if not given.no_record:
        append_to_results(rows)
    (found,) = measurements(rows)
    for layout in (RANGES, WIDTHS, RESIDUAL):
        print_table(layout.title, layout.columns, layout.lines(found))


if __name__ == "__main__":
    main()
