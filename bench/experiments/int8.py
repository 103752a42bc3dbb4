"""The deployable W8/A8 model against float32 on the CPU: dense images, the same model and batch, rounds of the sides in turn.

    python -m bench.experiments.int8                                          the digits teacher and DeiT-Tiny, the figures
    python -m bench.experiments.int8 --model digits --batch 4 --rounds 2      a short try

float32 is timm's own forward; both sides run under torch.inference_mode. Weights are needed for an accuracy, so a timm architecture first learns the
digits, enlarged to its size, through a part of its patches (--learning-steps; once, kept in --folder). Accuracy is on their real test split, beside
the share of those images on which int8 and the simulation agree. The int8 model is saved and read back by a new process, whose logits must be the
same bits. Rows are appended to bench/results/<device>.jsonl.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smi import datasets, invert
from smi.console import print_table
from smi.kernels.comparison import relative_error
from smi.models.by_name import load_model
from smi.models.folder import DESCRIPTION, record_of, save_model
from smi.models.vit import describe
from smi.quantization import load_quantized, quantize
from smi.quantization.int8 import products_saturate
from smi.quantization.recipe import CALIBRATION_IMAGES

from ..evidence.learning import learn
from ..tables.experiments import INT8
from ..tables.rows import measurements
from .cpu_attention import alternate
from .result_rows import append_to_results, with_environment

# How an architecture learns: through shares of the patches that take a fifth of the time that all would take; at twice the rate and unclipped, twelve
# blocks diverge.
LEARNING = {"kept": (0.125, 0.25), "noise": 0.1, "peak": 5e-4, "clip": 1.0}


def trained(name: str, steps: int, folder: Path) -> nn.Module:
    """The digits teacher, or an architecture that learned the digits in `steps` updates; kept in the folder."""
    if name == "digits":
        return load_model(name)
    path, how = folder / f"{name}-{steps}", {"data": "digits", "steps": steps, **LEARNING}
    if not (path / DESCRIPTION).exists() or record_of(path) != json.loads(json.dumps(how)):
        torch.manual_seed(0)
        model = load_model(name, random_weights=True)
        model.reset_classifier(10)
        if steps:
            learn(model.train(), *datasets.load("digits", model, "train"), steps, **LEARNING)
        save_model(model, path, how)
    return load_model(str(path))


def calibrated(model: nn.Module, iterations: int) -> nn.Module:
    """The simulation, calibrated with SMI images."""
    how = {"method": "smi", "iterations": iterations, "tv_weight": 5e-3, "labels": range(10)}
    return quantize(model, invert(model, num_images=CALIBRATION_IMAGES, batch_size=CALIBRATION_IMAGES, progress=False, **how))


def same_in_new_process(int8: nn.Module, images: Tensor) -> bool:
    """Whether a new process that loads the model gives the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        int8.save(Path(folder) / "model")
        save_file({"images": images.contiguous()}, Path(folder) / "images")
        subprocess.run([sys.executable, "-m", "bench.experiments.int8", "--answer", folder], check=True, cwd=Path(__file__).parents[2])
        return torch.equal(load_file(Path(folder) / "logits")["logits"], int8(images))


def answer(folder: Path) -> None:
    """What the new process does: load the model, write its logits."""
    save_file({"logits": load_quantized(folder / "model")(load_file(folder / "images")["images"])}, folder / "logits")


@torch.no_grad()
def quality(model: nn.Module, simulated: nn.Module, int8: nn.Module) -> dict:
    """Accuracy of the three on the real test digits, and how near int8 is to the simulation."""
    images, labels = datasets.load("digits", model, "test")
    logits = {
        side: torch.cat([part(some) for some in images.split(50)]) for side, part in (("float32", model), ("simulated", simulated), ("int8", int8))
    }
    mine, theirs = logits["int8"], logits["simulated"]
    return {
        "agreement_with_simulation": (mine.argmax(1) == theirs.argmax(1)).double().mean().item(),
        "distance_from_simulation": relative_error(mine, theirs),
        **{f"accuracy_{side}": (found.argmax(1) == labels).double().mean().item() for side, found in logits.items()},
    }


def measure(name: str, given: argparse.Namespace) -> list[dict]:
    """One row per number of threads."""
    model = trained(name, given.learning_steps, given.folder)
    simulated = calibrated(model, given.iterations)
    int8 = simulated.int8()
    vit = describe(model)
    images = torch.randn(given.batch, vit.channels, *vit.image_size, generator=torch.Generator().manual_seed(0))
    about = {"kind": "int8", "model": name, "batch": given.batch, "tokens": vit.num_prefix + vit.num_patches, "iterations": given.iterations}
    about |= {} if name == "digits" else {"learning_steps": given.learning_steps}
    about |= quality(model, simulated, int8) | {"same_in_new_process": same_in_new_process(int8, images)}
    about |= {"products_saturate": products_saturate(), "vnni": torch.cpu._is_vnni_supported()}
    rows = []
    for count in given.threads:
        torch.set_num_threads(count)
        with torch.inference_mode():
            seconds = alternate({"float32": lambda: model(images), "int8": lambda: int8(images)}, given.rounds)
        middle, least = ({side: function(values) for side, values in seconds.items()} for function in (statistics.median, min))
        timing = {"float32_seconds": middle["float32"], "int8_seconds": middle["int8"], "speedup": middle["float32"] / middle["int8"]}
        rows.append(about | timing | {"threads": count, "rounds": given.rounds, "speedup_of_smallest": least["float32"] / least["int8"]})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["digits", "deit_tiny_patch16_224"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=200, help="of the inversion that makes the images to calibrate with")
    parser.add_argument("--learning-steps", type=int, default=600, help="in which an architecture learns the digits")
    parser.add_argument("--folder", type=Path, default=Path("out/int8"), help="that keeps what has learned")
    parser.add_argument("--no-record", action="store_true", help="measure only, append nothing to the results")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.learning_steps < 0:
        parser.error(f"--learning-steps must be 0 or more, got {given.learning_steps}")
    if given.answer:
        answer(given.answer)
        return
    threads, rows = torch.get_num_threads(), []
    for name in given.model:
        torch.set_num_threads(threads)  # in which a model learns, whatever was timed before
        rows += measure(name, given)
    rows = with_environment("int8", rows)
    if not given.no_record:
        append_to_results(rows)
    lines = [line for found in measurements(rows) for line in INT8.lines(found)]
    print_table(f"W8/A8 on the CPU, batch {given.batch}, {torch.backends.cpu.get_cpu_capability()}", INT8.columns, lines)


if __name__ == "__main__":
    main()
