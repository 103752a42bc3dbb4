"""What `smi quantize` does: calibrate, measure on real images, write."""

from pathlib import Path

from torch import nn

from .. import datasets
from ..errors import InputError
from ..files import output_folder
from ..images.sparse_images import SparseImages
from ..images.storage import MANIFEST
from ..models.vit import describe
from ..quantization.int8 import products_saturate
from ..quantization.model import Images, accuracy
from ..quantization.simulate import quantize


def run_quantize(
    model: nn.Module,
    images: str,
    *,
    num_images: int | None = None,
    evaluation: str | None = None,
    output: Path | None = None,
    force: bool = False,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    **recipe,
) -> dict:
    """Quantise with the images in a folder of sparse images, or with the training split of a data set; the result as data.

    evaluation: labelled images to measure on. output: where the int8 model (W8/A8) or the simulation goes. recipe: settings of `quantize`.
    """
    if output is not None:
        output_folder(output, force)
    real = None if evaluation is None else datasets.load(evaluation, _described(model, mean, std), "test")
    given = calibration_images(model, images, num_images, mean, std)
    simulated = quantize(model, given, **recipe)
    widths = simulated.facts.recipe
    int8 = simulated.int8() if (widths.weight_bits, widths.activation_bits, widths.attention) == (8, 8, False) else None
    result = {"model": simulated.facts.name, "widths": str(widths), "calibration_images": len(given), "images": images}
    if real is not None:
        rows = {"full_precision": model, "simulated": simulated, **({} if int8 is None else {"int8": int8})}
        result["evaluation"] = {"data": evaluation, "images": len(real[0]), **{name: accuracy(part, *real) for name, part in rows.items()}}
    if int8 is not None:
        result["int8_weight_bits_here"] = 7 if products_saturate() else 8
    if output is not None:
        (simulated if int8 is None else int8).save(output, force=True)
        result.update(output=str(output), kind="simulated" if int8 is None else "int8")
    return result


def calibration_images(model: nn.Module, source: str, limit: int | None, mean=None, std=None) -> Images:
    """Sparse images from their folder, or the training split of a data set that `datasets.load` knows."""
    if limit is not None and limit < 1:
        raise InputError(f"num-images must be at least 1, got {limit}")
    if (Path(source) / MANIFEST).is_file():
        return SparseImages.load(source)[:limit]
    return datasets.load(source, _described(model, mean, std), "train", limit)[0]


def _described(model: nn.Module, mean, std):
    return model if mean is None and std is None else describe(model, mean=mean, std=std)


def print_quantized(result: dict) -> None:
    from .tables import _console, _table

    if "evaluation" in result:
        measured = result["evaluation"]
        print(f"{result['model']}, {result['widths']}, calibrated with {result['calibration_images']} images")
        shown = _table(f"{measured['images']} of {measured['data']}", "model", "accuracy")
        for name in ("full_precision", "simulated", "int8"):
            if name in measured:
                shown.add_row(name.replace("_", " "), f"{measured[name]:.2%}")
        _console().print(shown)
    else:
        print(f"{result['model']} quantised to {result['widths']} with {result['calibration_images']} images; --eval DATA measures its accuracy")
    if result.get("int8_weight_bits_here") == 7:
        print("int8: this processor adds byte products in 16 bits (no VNNI), so weights are rounded to 7 bits when the model is loaded here")
    if "output" in result:
        print(f"the {result['kind']} model is in {result['output']}; smi.load_quantized reads it")
