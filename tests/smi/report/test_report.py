"""The report: one file that fetches nothing, holds the figures of its folder, and refuses in one sentence."""

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import smi
from smi.cli.main import run
from smi.errors import InputError, RunError
from smi.inversion.snapshots import FILE
from smi.report import one_run, pictures, write_report
from smi.report.evidence_data import mean_curve, read_evidence
from smi.report.page import MARK
from smi.report.several_runs import DEMO, FORMAT
from smi.teachers import digits
from tests.conftest import fails

PNG = b"\x89PNG"
SETTINGS = {"iterations": 8, "batch_size": 4, "labels": range(10), "tv_weight": 5e-3, "progress": False}


class Page(HTMLParser):
    """What a page says and refers to."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text, self.rows = [], "", []
        self.cell = None
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell.replace("\u00a0", " "))
            self.cell = None

    def handle_data(self, data):
        self.text += data
        if self.cell is not None:
            self.cell += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == name)

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for attributes in self.all("section")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the images of three methods."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in (("dense", {}), ("smi", {}), ("pri4", {"division": 4})):
        smi.invert(digits(), method=name.removesuffix("4"), num_images=8, output=folder / name, **options, **SETTINGS)
    smi.invert(digits(), method="gaussian", num_images=8, output=folder / "gaussian", labels=range(10), progress=False)
    return folder


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """The page of PRI's folder, and where it lies."""
    out = tmp_path_factory.mktemp("page")
    write_report(runs / "pri4", out)
    return Page(out / "report.html"), out


def check_self_contained(page: Page) -> None:
    assert not re.search(r"(?:src|href)\s*=(?!\s*[\"']?(?:data:|#))", page.source), "only embedded pictures and links within the page"
    assert not re.search(r"url\(|@import|<script|<link|<iframe|srcset", page.source)
    for image in page.all("img"):
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True).startswith(PNG)
        assert len(image["alt"]) > 10
        assert int(image["width"]) > 0 < int(image["height"])
    assert [link["href"] for link in page.all("a")] == [f"#{section}" for section in page.sections]
    assert len(page.all("figcaption")) == len(page.all("img"))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all(section.strip() for section in page.sections)
    assert len(set(page.sections)) == len(page.sections)


def test_the_page_of_one_folder_is_one_file(page):
    html, out = page
    check_self_contained(html)
    assert html.sections == ["images", "retained-patches", "recognition", "progress-of-one-image", "provenance"]
    beside = {path.read_bytes() for path in (out / "report").iterdir()}
    assert {base64.b64decode(image["src"].partition(",")[2]) for image in html.all("img")} == beside
    names = {path.stem for path in (out / "report").iterdir()}
    assert names == {"images", "retained", "stages", "recognition", "progress", "loss"}
    assert sorted(path.name for path in out.iterdir()) == ["report", "report.html"], "no temporary file is left"


def test_its_tables_hold_the_figures(page, runs):
    html, _ = page
    images = smi.SparseImages.load(runs / "pri4")
    found = smi.evaluate(images, digits())
    assert html.row("all images")[1:3] == ["8", f"{found.teacher.agreement:.1%}".replace("%", " %")]
    for number, stage in enumerate(found.stages, start=1):
        assert html.row(f"stage {number} of 4")[3] == f"{stage.confidence:.3f}"
    assert html.row("patches at random")[4] == f"{found.random.cross_entropy:.3f}"
    assert html.row("weights_sha256")[1] == images.provenance["weights_sha256"]
    assert html.row("schedule")[1].startswith("before iteration 2 the 16 patches of highest importance leave as an image")
    assert "8 images of 2 classes, each with 16 of 64 patches (75% sparse)" in html.text
    assert "the model that the images came from" in html.text


def test_again_it_replaces_its_own_page_alone(runs, tmp_path, capsys):
    arguments = ["report", str(runs / "smi"), "-o", str(tmp_path), "--json"]
    for _ in range(2):
        assert run(arguments) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["report"] == str(tmp_path / "report.html")
        assert all(Path(path).read_bytes().startswith(PNG) for path in result["pictures"])
    assert MARK in (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").write_text("mine")
    fails(capsys, arguments[:-1], 2, "was not written by smi report", "--output")
    assert (tmp_path / "report.html").read_text() == "mine"


def test_by_default_it_lies_in_the_folder(runs, capsys):
    assert run(["report", str(runs / "dense")]) == 0
    assert str(runs / "dense" / "report.html") in capsys.readouterr().out
    html = Page(runs / "dense" / "report.html")
    assert "Every image has all its patches." in html.text
    assert len(smi.SparseImages.load(runs / "dense")) == 8


def write_demo(folder: Path) -> dict:
    row = {"sparsity": 0.75, "images": 8, "agreement": 0.875, "w8a8": 0.99, "w4a8": 0.985, "transfer": 0.5}
    timed = {"seconds": 2.0, "images_per_second": 4.0, "speedup": 6.25, "flops_speedup": 6.58}
    table = [{**row, **timed, "method": "PRI v=4", "folder": "pri4"}, {**row, "method": "Gaussian noise", "folder": "gaussian", "agreement": 0.125}]
    demo = {"format": FORMAT, "table": table, "notes": ["A note of the demo."], "full": 0.99, "settings": {}, "downstream": {"steps": 7}}
    (folder / DEMO).write_text(json.dumps(demo))
    return demo


def test_the_page_of_a_demo(runs, tmp_path):
    write_demo(runs)
    try:
        write_report(runs, tmp_path)
    finally:
        (runs / DEMO).unlink()
    html = Page(tmp_path / "report.html")
    check_self_contained(html)
    assert html.sections[:5] == ["images", "comparison", "published-figures-beside-ours", "pri-v-4", "gaussian-noise"]
    assert set(html.sections[5:]) == {"dense", "smi", "provenance"}, "folders that the table does not name come after those that it names"
    assert html.row("PRI v=4") == ["PRI v=4", "75 %", "8", "2.0", "4.0", "6.25×", "6.58×", "87.5 %", "99.0 %", "98.5 %", "50.0 %"]
    assert html.row("Gaussian noise")[3:8] == ["–", "–", "–", "–", "12.5 %"]
    assert html.row("SMI over dense")[1:3] == ["2.57×", "3.79×"]
    assert html.row("PRI v=4 over dense")[3:] == ["6.25×", "6.58×"]
    assert ["SMI", "64.04 %", "70.13 %", "77.51 %", "79.63 %", "–", "–"] in html.rows
    assert ["PRI v=4", "–", "–", "–", "–", "98.5 %", "99.0 %"] in html.rows
    assert ["the model itself", "90.23 %", "71.66 %", "95.36 %", "79.41 %", "99.0 %"] in html.rows
    assert "other models, data and machines" in html.text
    assert "A note of the demo. Quantised at these widths the teacher loses at most 1\u00a0%, whichever images" in html.text
    assert {"speedup", "accuracy", "overview", "pri4-stages", "dense-progress"} <= {path.stem for path in (tmp_path / "report").iterdir()}
    assert "Nothing was optimised" in html.text


def test_folders_without_a_demo(runs, tmp_path):
    write_report(runs, tmp_path)
    html = Page(tmp_path / "report.html")
    check_self_contained(html)
    assert html.row("pri4")[1:4] == ["8", "16 of 64", "4"]
    assert "published-figures-beside-ours" not in html.sections


def write_evidence(folder: Path, runs: Path) -> None:
    """Two seeds of two methods, the second without a seed's students."""
    curve = [{"step": 5, "seconds": 1.0, "kl": 1.0, "accuracy": 0.5}, {"step": 10, "seconds": 2.0, "kl": 0.5, "accuracy": 0.75}]
    late = [{"step": 5, "seconds": 3.0, "kl": 1.0, "accuracy": 0.7}, {"step": 10, "seconds": 4.0, "kl": 0.5, "accuracy": 0.85}]
    dense = {"gflops": 4.0, "agreement": 0.9, "full": 0.99, "w8a8": 0.98, "w4a8": 0.97}
    cells = {
        (0, "dense"): {**dense, "seconds": 10.0, "copy": 0.75, "copy_curve": curve},
        (1, "dense"): {**dense, "seconds": 20.0, "copy": 0.85, "copy_curve": late},
        (0, "pri4"): {"seconds": 2.0, "gflops": 0.5, "agreement": 0.7, "new_column": 1.0},
        (1, "pri4"): {"seconds": 5.0},
    }
    (folder / "config.json").write_text(json.dumps({"data": "digits", "teacher": "digits", "images": 8, "iterations": 8}))
    for (seed, row), cell in cells.items():
        place = folder / f"seed{seed}" / row
        place.mkdir(parents=True)
        (place / "cell.json").write_text(json.dumps(cell))
    smi.SparseImages.load(runs / "pri4").save(folder / "seed1" / "pri4" / "images")


def test_the_page_of_evidence(runs, tmp_path):
    write_evidence(tmp_path, runs)
    write_report(tmp_path)
    html = Page(tmp_path / "report.html")
    check_self_contained(html)
    assert html.sections == ["images", "comparison", "convergence", "published-figures-beside-ours", "provenance"]
    assert html.row("dense")[1:3] == ["15.0 ± 7.1", "1.00 ± 0.00"]
    assert html.row("PRI v=4")[1:4] == ["3.5 ± 2.1", "4.50 ± 0.71", "0.50"]
    assert ["method", "teacher agrees", "full precision", "W8/A8", "W4/A8"] in html.rows
    assert ["dense", "90.0 ± 0.0", "99.0 ± 0.0", "98.0 ± 0.0", "97.0 ± 0.0"] in html.rows
    assert ["PRI v=4", "70.0", "–", "–", "–"] in html.rows
    assert [row for row in html.rows if row[0] == "dense"][2] == ["dense", "80.0 ± 7.1"]
    assert html.row("PRI v=4 over dense")[3:] == ["4.50×", "8.00×"]
    assert ["dense (DeepInversion)", "69.51 %", "70.32 %", "90.02 %", "74.88 %", "80.0 %"] in html.rows
    assert {path.stem for path in (tmp_path / "report").iterdir()} == {"overview", "speedup", "accuracy", "students", "copy-step", "copy-seconds"}


def test_learning_curves_are_means_over_seeds(runs, tmp_path):
    write_evidence(tmp_path, runs)
    found = mean_curve(read_evidence(tmp_path), "dense", "copy", "seconds")
    assert (list(found.x), list(found.y)) == ([2.0, 3.0], pytest.approx([0.6, 0.8]))
    assert found.spread == pytest.approx([0.1414, 0.0707], abs=1e-3)
    assert mean_curve(read_evidence(tmp_path), "pri4", "copy", "step") is None


def test_only_the_embedded_teacher_is_asked_unnamed(runs, tmp_path, monkeypatch):
    images = smi.SparseImages.load(runs / "smi")
    images.provenance.update(model="deit_base_patch16_224", note="<script>alert(1)</script>")
    images.save(tmp_path / "images")
    monkeypatch.setattr("smi.report.judge.load_model", lambda *_, **__: pytest.fail("nothing is to be fetched"))
    write_report(tmp_path / "images")
    html = Page(tmp_path / "images" / "report.html")
    assert "The images were not judged: pass --model deit_base_patch16_224 --checkpoint FILE" in html.text
    assert "<script>" not in html.source
    assert "No snapshots of this run were kept" in html.text


def test_a_model_of_the_users_own(runs, tmp_path, capsys):
    images = smi.SparseImages.load(runs / "smi")
    images.provenance.update(weights_sha256="other")
    images.save(tmp_path / "images")
    assert run(["report", str(tmp_path / "images"), "--model", "digits"]) == 0
    assert "with other weights than the images came from" in Page(tmp_path / "images" / "report.html").text
    fails(capsys, ["report", tmp_path / "images", "--model", "vit_tinny_patch16_224"], 2, "unknown model")
    fails(capsys, ["report", tmp_path / "images", "--model", "digits", "--checkpoint", tmp_path / "no.pth"], 2, "comes with its weights")


def test_a_damaged_progress_is_said(runs, tmp_path):
    images = smi.SparseImages.load(runs / "pri4")
    images.save(tmp_path)
    (tmp_path / FILE).write_bytes(b"nothing of the kind")
    write_report(tmp_path)
    assert "progress.safetensors is damaged" in Page(tmp_path / "report.html").text


def test_nothing_to_report(runs, tmp_path, capsys):
    fails(capsys, ["report", tmp_path / "no"], 2, "is no folder")
    fails(capsys, ["report", tmp_path], 2, "holds nothing to report")
    (tmp_path / "file").write_text("")
    fails(capsys, ["report", tmp_path / "file"], 2, "is no folder")
    (tmp_path / "images.json").write_text("{")
    fails(capsys, ["report", tmp_path], 2, "cannot be read as JSON")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "images.json"], "nothing is made where nothing can be reported"


CELLS = {
    "[]": "cell.json holds no JSON object",
    "[" * 100_000: "cell.json cannot be read as JSON",
    '{"seconds": "2"}': "cell.json is damaged: seconds is no number",
    '{"seconds": NaN}': "seconds is no number",
    '{"copy_curve": [1]}': "copy_curve is no learning curve",
    '{"copy_curve": [{"accuracy": "x"}]}': "copy_curve is no learning curve",
}
WRONG = [{"table": []}, {"settings": [1]}, {"settings": {"iterations": 4}}, {"notes": [1]}, {"downstream": [1]}, {"full": "1"}]  # of the demo's table


def test_a_provenance_of_another_form_is_shown_as_it_is(runs):
    """A report must not end on what only describes the images."""
    schedule = [[{"iteration": "x", "count": 1, "which": "lowest", "fate": "drop"}], [{"count": 1}], "x", 3, [1]]
    for value in schedule:
        assert one_run.provenance_table({"schedule": value}).rows == [("schedule", value if isinstance(value, str) else json.dumps(value))]
    images = dataclasses.replace(smi.SparseImages.load(runs / "smi"), provenance={"method": ["x"], "model": None})
    assert one_run.title(images) == "['x'] inversion of None"


def test_damaged_tables(runs, tmp_path, capsys):
    write_evidence(tmp_path, runs)
    cell = tmp_path / "seed0" / "dense" / "cell.json"
    for text, reason in CELLS.items():
        cell.write_text(text)
        fails(capsys, ["report", tmp_path], 2, reason)
    row = {"method": "x", "folder": "x", "sparsity": 0.5, "images": 2}
    wrong = [{"sparsity": "x"}, {"speedup": 2}, {"speedup": 2, "flops_speedup": "x"}, {"transfer": [1]}, {"images": 1e999}, {"folder": 3}]
    tables = [{"table": [row | change]} for change in wrong] + [{"table": [row]} | change for change in WRONG]
    for text in ("{", "[]", "[" * 100_000, '{"format": "other"}', *(json.dumps({"format": FORMAT, **table}) for table in tables)):
        (runs / DEMO).write_text(text)
        try:
            fails(capsys, ["report", runs, "-o", tmp_path / "out"], 2, "cannot be read as the demo's table")
        finally:
            (runs / DEMO).unlink()
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    fails(capsys, ["report", runs / "smi", "-o", tmp_path / "file"], 2, "is a file")
    fails(capsys, ["report", runs / "smi", "-o", tmp_path / "file" / "below"], 2, "cannot be written")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smi.csrc.cache.os.replace", full)
    fails(capsys, ["report", runs / "smi", "-o", tmp_path / "out"], 1, "No space left on device")
    assert list((tmp_path / "out" / "report").iterdir()) == []


def test_retained_shares_and_stages(runs):
    images = smi.SparseImages.load(runs / "pri4")
    shares = [one_run.retained_fraction(images, stage) for stage in range(4)]
    assert torch.stack(shares).sum(0) == pytest.approx(1.0), "the stages of a trajectory share out all its patches"
    assert shares[0].shape == (8, 8)
    first = images[(images.trajectory == 0) & (images.stage == 2)].index.flatten()
    title, cells = one_run.stage_maps(images)[0]
    assert title == "label 0"
    assert (cells.flatten() == 2).nonzero().flatten().tolist() == first.tolist()


def test_stages_put_together_are_the_whole_image(runs):
    images = smi.SparseImages.load(runs / "pri4")
    whole = pictures.together(images)
    assert (len(whole), whole.sparsity) == (2, 0.0)
    dense = whole.to_dense()
    for number in (0, 1):
        one = images[images.trajectory == number]
        cells = smi.images.patches.to_patches(dense[number : number + 1], images.patch_size)
        assert all(torch.equal(cells[0, index], patches) for index, patches in zip(one.index, one.patches, strict=True))
    assert pictures.variety(images, 3).stage.tolist() == [0, 1, 1]
    assert len(pictures.variety(images, 20)) == 8


def test_pictures_need_images_and_room(runs, tmp_path):
    with pytest.raises(InputError, match="no images"):
        pictures.rows_of(smi.SparseImages.load(runs / "smi")[:0])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        pictures.picture_grid(pictures.rows_of(smi.SparseImages.load(runs / "smi")), tmp_path / "file" / "grid.png")
