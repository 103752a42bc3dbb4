"""`smi quantize`."""

import json
import time
from pathlib import Path

import click
from torch import nn

from .. import datasets
from ..console import print_table
from ..errors import InputError
from ..files import output_folder
from ..images.sparse_images import SparseImages
from ..images.storage import MANIFEST
from ..models.by_name import load_model
from ..models.vit import describe
from ..quantization.int8 import products_saturate
from ..quantization.model import Images, accuracy
from ..quantization.onnx_file import FILE, save_onnx
from ..quantization.onnx_graph import needed
from ..quantization.recipe import LINEAR_INPUTS
from ..quantization.settle import MAX_IMAGES, inverting, print_round
from ..quantization.simulate import quantize
from .options import AS_JSON, FORCE, MODEL, PATH, SEED, WEIGHTS, options


@click.command("quantize")
@options(
    click.option("--images", help="A folder of sparse images; or real ones: digits, cifar10, imagenet or a path. Made when absent."),
    click.option(
        "--recipe",
        default=LINEAR_INPUTS,
        help="Which activations: linear-inputs, published (the residual stream too), or reparametrized (for few bits).",
    ),
    click.option("--w-bits", "weight_bits", default=8, help="Bits of the weights, 2 to 8."),
    click.option("--a-bits", "activation_bits", default=8, help="Bits of the activations, 2 to 8."),
    click.option("--eval", "evaluation", help="Real images on which accuracy is measured: digits, cifar10, imagenet or a path."),
    click.option("--output", "-o", type=PATH, help="Folder for the model: int8 where both are 8 bits, else the simulation."),
    click.option("--to", default="smi", type=click.Choice(["smi", "onnx"]), help="What --output gets: smi.load_quantized's files, or model.onnx."),
    MODEL,
    WEIGHTS,
    click.option("--num-images", "-n", type=int, help="Images to calibrate with, the first ones; all when absent."),
    click.option("--ranges", help="Of the activations: minmax, percentile or mse; minmax, percentile for reparametrized when absent."),
    click.option("--percentile", default=99.9, help="--ranges percentile: this percentile is the upper end, 100 minus it the lower."),
    click.option("--weight-ranges", help="minmax or mse; minmax, mse for reparametrized when absent."),
    click.option("--max-images", default=MAX_IMAGES, help="Without --images: calibration ends here, if its ranges have not settled before."),
    SEED,
    click.option("--attention", is_flag=True, help="Quantise both sides of attention's two GEMMs as well."),
    FORCE,
    AS_JSON,
)
def command(images, model, image_size, checkpoint, random_weights, as_json, **settings) -> None:
    """Quantise a ViT, calibrated with synthetic images: those in a folder, or the model's own, made until the ranges of its activations settle."""
    teacher = load_model(model, checkpoint=checkpoint, random_weights=random_weights, image_size=image_size)
    result = run_quantize(teacher, images, progress=not as_json, **settings)
    print(json.dumps(result)) if as_json else print_quantized(result)


def run_quantize(
    model: nn.Module,
    images: str | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
    num_images: int | None = None,
    evaluation: str | None = None,
    output: Path | None = None,
    to: str = "smi",
    force: bool = False,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    **recipe,
) -> dict:
    """Quantise with the images in a folder of sparse images, with the training split of a data set, or with images made; the result as data.

    evaluation: labelled images to measure on. output: where the int8 model (W8/A8) or the simulation goes, or, with
    to="onnx", the ONNX file. recipe: settings of `quantize`.
    """
    began = time.perf_counter()
    if to == "onnx":
        needed()
        if output is None:
            raise InputError("to onnx needs a folder: pass --output")
    if output is not None:
        output_folder(output, force)
    pictures = evaluation is not None or not (images is None or _are_sparse(images))
    sizes = datasets.Sizes.of(describe(model, mean=mean, std=std)) if pictures else None
    real = None if evaluation is None or sizes is None else datasets.load(evaluation, sizes, "test")
    if images is None and num_images is not None:
        raise InputError("num-images counts the images of --images: without them say --max-images")
    made = inverting(model, seed, mean=mean, std=std)
    given = made if images is None else calibration_images(images, num_images, sizes)
    simulated = quantize(model, given, on_round=print_round if progress else None, **recipe)
    calibration = simulated.facts.calibration
    widths = simulated.facts.recipe
    int8 = simulated.int8() if (widths.weight_bits, widths.activation_bits, widths.attention) == (8, 8, False) else None
    about = {"recipe": widths.name, "widths": str(widths), "calibration_images": calibration["images"], "images": images}
    result = {"model": simulated.facts.name, **about, "seconds": time.perf_counter() - began}
    if images is None:
        result["calibration"] = calibration
    if real is not None:
        rows = {"full_precision": model, "simulated": simulated, **({} if int8 is None else {"int8": int8})}
        accuracies = {name: accuracy(part, *real) for name, part in rows.items()}
        result["evaluation"] = {"data": evaluation, "images": len(real[0]), **accuracies}
    if sizes is not None:
        result["preprocessing"] = sizes.record()
    if int8 is not None:
        result["int8_weight_bits_here"] = 7 if products_saturate() else 8
    if output is not None:
        deployed = simulated if int8 is None else int8
        save_onnx(deployed, output, force=True) if to == "onnx" else deployed.save(output, force=True)
        result.update(output=str(output), kind="onnx" if to == "onnx" else deployed.KIND)
    return result


def calibration_images(source: str, limit: int | None, sizes: datasets.Sizes | None) -> Images:
    """Sparse images from their folder, or the training split of a data set that `datasets.load` knows."""
    if limit is not None and limit < 1:
        raise InputError(f"num-images must be at least 1, got {limit}")
    if sizes is None or _are_sparse(source):
        return SparseImages.load(source)[:limit]
    return datasets.load(source, sizes, "train", limit)[0]


def _are_sparse(source: str) -> bool:
    return (Path(source) / MANIFEST).is_file()


def print_quantized(result: dict) -> None:
    if "evaluation" in result:
        measured = result["evaluation"]
        print(f"{result['model']}, {result['widths']}, recipe {result['recipe']}, calibrated with {result['calibration_images']} images")
        cells = [(name.replace("_", " "), f"{measured[name]:.2%}") for name in ("full_precision", "simulated", "int8") if name in measured]
        print_table(f"{measured['images']} of {measured['data']}", ("model", "accuracy"), cells, wrap=True)
    else:
        print(f"{result['model']} quantised to {result['widths']} with {result['calibration_images']} images; --eval DATA measures its accuracy")
    if result.get("int8_weight_bits_here") == 7:
        print("int8: this processor adds byte products in 16 bits (no VNNI), so weights are rounded to 7 bits when the model is loaded here")
    print(f"{result['seconds']:.0f} s{_made(result)}")
    if "output" in result:
        reader = f"onnxruntime runs {FILE}" if result["kind"] == "onnx" else "smi.load_quantized reads it"
        print(f"the {result['kind']} model is in {result['output']}; {reader}")


def _made(result: dict) -> str:
    if "calibration" not in result:
        return ""
    made = result["calibration"]
    return f", {made['images']} images made; the ranges have {'settled' if made['settled'] else 'not settled'}"
