"""`smi evaluate`."""

import json

import click

from ..console import print_table
from ..datasets import Sizes, load
from ..evaluate import evaluate
from ..images.sparse_images import SparseImages
from ..models.by_name import load_model
from ..models.levels import read_model
from .options import AS_JSON, FOLDER, MODEL, PATH, SEED, WEIGHTS, options


@click.command("evaluate")
@options(
    FOLDER,
    MODEL,
    WEIGHTS,
    click.option("--verifier", help="Another model that judges the images: a timm architecture, 'digits', or a folder with a model."),
    click.option("--verifier-checkpoint", type=PATH, help="Its weights; timm's pretrained ones when absent."),
    click.option("--against", help="Real images to compare with: digits, cifar10 or a path."),
    SEED,
    AS_JSON,
)
def command(folder, model, image_size, checkpoint, random_weights, mean, std, verifier, verifier_checkpoint, against, seed, as_json) -> None:
    """Judge the images in FOLDER: by the model they came from, stage by stage, by another model, and beside real images."""
    images = SparseImages.load(folder)
    teacher = load_model(model, checkpoint=checkpoint, random_weights=random_weights, image_size=image_size)
    other = None if verifier is None else load_model(verifier, checkpoint=verifier_checkpoint)
    sizes = None if against is None else Sizes.of(read_model(teacher, mean=mean, std=std)[0])
    real = None if against is None or sizes is None else load(against, sizes, "test")
    result = evaluate(images, teacher, verifier=other, real=real, seed=seed)
    about = {} if sizes is None else {"against": {"data": against, "preprocessing": sizes.record()}}
    print(json.dumps({**result.record(), **about})) if as_json else print_evaluation(result, folder)


def print_evaluation(result, folder) -> None:
    """Recognition by stage and by another model, and likeness to real images."""
    columns = ("read by", "images", "agree with their label", "confidence", "cross-entropy")
    rows = [("the model", result.teacher)]
    if len(result.stages) > 1:
        rows += [(f"  stage {number} of {len(result.stages)}", stage) for number, stage in enumerate(result.stages, start=1)]
        rows.append(("  patches at random", result.random))
    if result.verifier is not None:
        rows.append((f"the verifier, {result.verifier.reads}", result.verifier.recognition))
    cells = [(name, row.images, f"{row.agreement:.1%}", f"{row.confidence:.3f}", f"{row.cross_entropy:.3f}") for name, row in rows]
    print_table(f"images in {folder}", columns, cells, wrap=True)
    if result.verifier is not None:
        print(f"the verifier gives the model's answer to {result.verifier.same_answer:.1%} of the images")
    if result.likeness is not None:
        ssim = "" if result.likeness.ssim is None else f", SSIM {result.likeness.ssim:.3f}"
        print(f"nearest real image of the same class, retained pixels: PSNR {result.likeness.psnr:.1f} dB{ssim} ({result.likeness.images} images)")
