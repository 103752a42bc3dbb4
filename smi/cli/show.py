"""`smi show`."""

import json

import click

from ..errors import InputError
from ..images.sparse_images import SparseImages
from ..report import picture_grid, rows_of
from .options import AS_JSON, FOLDER, PATH, options


@click.command("show")
@options(
    FOLDER,
    click.option("--output", "-o", type=PATH, help="The PNG to write; FOLDER/grid.png, replaced, when absent."),
    click.option("--columns", default=10, type=click.IntRange(1, 100), help="Images side by side."),
    click.option("--force", is_flag=True, help="Replace the PNG if it is there."),
    AS_JSON,
)
def command(folder, output, columns, force, as_json) -> None:
    """Draw a grid of the images in FOLDER: dropped patches grey, PRI's stages in rows."""
    if output is not None and output.exists() and not force:
        raise InputError(f"{output} exists: choose another name, or pass --force to replace it")
    images = SparseImages.load(folder)
    source = images.provenance
    patches = f"{images.index.shape[1]} of {images.grid[0] * images.grid[1]} patches"
    title = f"{source.get('method', '')} inversion of {source.get('model', 'a ViT')}, {patches}"
    path = picture_grid(rows_of(images, columns), output or folder / "grid.png", title=title)
    print(json.dumps({"picture": str(path), "images": len(images)}) if as_json else f"picture written to {path}")
