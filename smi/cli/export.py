"""`smi export`."""

import json

import click

from ..images.export import export_png, export_webdataset
from ..images.sparse_images import SparseImages
from .options import AS_JSON, FOLDER, FORCE, PATH, options


@click.command("export")
@options(
    FOLDER,
    click.option("--output", "-o", required=True, type=PATH, help="Folder for the exported files."),
    click.option("--to", default="png", type=click.Choice(["png", "webdataset"])),
    click.option("--shard-images", default=1000, help="webdataset: images per shard."),
    FORCE,
    AS_JSON,
)
def command(folder, output, to, shard_images, force, as_json) -> None:
    """Write the images in FOLDER as PNG files or as WebDataset shards."""
    images = SparseImages.load(folder)
    paths = export_png(images, output, force=force) if to == "png" else export_webdataset(images, output, shard_images=shard_images, force=force)
    result = {"output": str(output), "images": len(images), "files": len(paths)}
    print(json.dumps(result) if as_json else f"{len(images)} images in {len(paths)} files written to {output}")
