"""`smi export`."""

import json
from pathlib import Path

import click

from ..images.export import export_parquet, export_png, export_webdataset
from ..images.sparse_images import SparseImages
from ..models.by_name import load_model
from ..quantization.files import MANIFEST
from ..quantization.load import load_quantized
from ..quantization.onnx_file import save_onnx
from .options import AS_JSON, FOLDER, FORCE, PATH, options


@click.command("export")
@options(
    FOLDER,
    click.option("--output", "-o", required=True, type=PATH, help="Folder for the exported files."),
    click.option("--to", default="png", type=click.Choice(["png", "webdataset", "parquet", "onnx"]), help="onnx: of a model, the others of images."),
    click.option("--shard-images", default=1000, help="webdataset, parquet: images per shard."),
    FORCE,
    AS_JSON,
)
def command(folder, output, to, shard_images, force, as_json) -> None:
    """Write the images in FOLDER as PNG files, WebDataset or Parquet shards; or the model in it, float or quantised, as model.onnx."""
    if to == "onnx":
        path = save_onnx(_model_in(folder), output, force=force)
        print(json.dumps({"output": str(output), "file": path.name}) if as_json else f"the model is in {path}")
        return
    images = SparseImages.load(folder)
    if to == "png":
        paths = export_png(images, output, force=force)
    else:
        export = export_parquet if to == "parquet" else export_webdataset
        paths = export(images, output, shard_images=shard_images, force=force)
    result = {"output": str(output), "images": len(images), "files": len(paths)}
    print(json.dumps(result) if as_json else f"{len(images)} images in {len(paths)} files written to {output}")


def _model_in(folder: Path):
    """A quantised model, or one that training or distillation wrote."""
    return load_quantized(folder) if (folder / MANIFEST).is_file() else load_model(str(folder))
