"""`smi report`."""

import json

import click

from ..report import write_report
from .options import AS_JSON, FOLDER, PATH, options


@click.command("report")
@options(
    FOLDER,
    click.option("--output", "-o", type=PATH, help="Folder for report.html and the pictures; FOLDER when absent."),
    click.option("--model", help="Who judges the images, as in the other commands; the model they came from where it is 'digits' when absent."),
    click.option("--checkpoint", type=PATH, help="Its weights; without --model those of the model that the images name."),
    AS_JSON,
)
def command(folder, output, model, checkpoint, as_json) -> None:
    """Show what FOLDER holds, images, several folders of them, a demo or evidence, on one HTML page."""
    result = write_report(folder, output, model=model, checkpoint=checkpoint)
    print(json.dumps(result) if as_json else f"report written to {result['report']}, its {len(result['pictures'])} pictures beside it")
