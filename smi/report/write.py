"""`smi report`: what a folder holds, as one self-contained page and the pictures beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError
from ..files import output_folder, write_text
from ..images.storage import MANIFEST
from . import evidence, evidence_data, one_run, several_runs
from .judge import Judge
from .one_run import Place
from .page import MARK, Section, render

PAGE, PICTURES = "report.html", "report"


def write_report(folder: str | Path, output: str | Path | None = None, *, model: str | None = None, checkpoint: Path | None = None) -> dict[str, Any]:
    """Write OUTPUT/report.html, everything embedded, and its pictures to OUTPUT/report/; OUTPUT is `folder` when None.

    folder: what `smi invert` wrote; a folder of several such folders, as `smi demo` writes with its table; or one of `bench.evidence`. model,
    checkpoint: who judges the images, as of `load_model`; None: the embedded teacher, where they came from it. Returns the paths as data. Raises
    InputError where there is nothing to report, a file cannot be read, or a report.html that is not ours would be replaced; RunError where writing
    fails.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give one that smi invert, smi demo or bench.evidence wrote")
    target = Path(output) if output is not None else folder
    judge = Judge(model, checkpoint)
    try:
        title, summary, chapters = _chapters(folder, judge)
        page = _open(target)
        drawn: list[Path] = []

        def place(name: str) -> Path:
            drawn.append(target / PICTURES / f"{name}.png")
            return drawn[-1]

        text = render(title, summary, chapters(place))
        write_text(page, text)
    except OSError as error:
        where = error.filename or target
        raise RunError(f"the report on {folder} failed at {where} ({error.strerror or error})") from error
    return {"report": str(page), "pictures": [str(path) for path in drawn]}


def _chapters(folder: Path, judge: Judge) -> tuple[str, str, Callable[[Place], list[Section]]]:
    """Title, summary, and a function of `place` that draws the pictures and gives the sections."""
    name = folder.resolve().name
    if (folder / MANIFEST).is_file():
        result = one_run.read_result(folder, name, judge)
        return one_run.title(result.images), one_run.summary(result), lambda place: one_run.sections(result, place)
    if evidence_data.is_evidence(folder):
        found = evidence_data.read_evidence(folder)
        return f"Evidence in {name}", evidence.summary(found), lambda place: evidence.sections(found, place)
    folders = several_runs.image_folders(folder)
    if not folders:
        raise InputError(f"{folder} holds nothing to report: no images of smi invert, no folders of them, and no evidence")
    return _several(folder, folders, judge)


def _several(folder: Path, folders: list[Path], judge: Judge) -> tuple[str, str, Callable[[Place], list[Section]]]:
    demo = several_runs.read_demo(folder)
    titles = {} if demo is None else {row["folder"]: row["method"] for row in demo["table"]}
    order = [folder / name for name in titles if folder / name in folders]  # as in the table
    order += [path for path in folders if path not in order]
    results = [(path, one_run.read_result(path, titles.get(path.name, path.name), judge)) for path in order]
    summary = f"{len(results)} folders of images" + ("." if demo is None else ", made by smi demo from the embedded digits teacher without data.")
    return f"Inversions in {folder.resolve().name}", summary, lambda place: several_runs.sections(results, demo, place)


def _open(target: Path) -> Path:
    """The page to write; raises InputError where it cannot be written or is a file of somebody else's."""
    output_folder(target, force=True)
    output_folder(target / PICTURES, force=True)
    page = target / PAGE
    if page.exists() and not (page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:2000]):
        raise InputError(f"{page} was not written by smi report: choose another folder with --output, or move it away")
    return page
