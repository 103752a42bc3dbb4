"""The measured tables: each from small rows, between the markers of a document, and every row read by one of them."""

import json

import pytest

from bench.measuring import record
from bench.tables import __main__ as command
from bench.tables import documents
from bench.tables.markdown import END, as_markdown, make, render
from bench.tables.rows import commit, current, measured_on, processor, superseded
from smi.errors import InputError

from . import rows as made

ROWS = made.every()
BEGIN = "<!-- table: {} (make tables) -->\n"

LINES = {  # of each table, one that its rows give
    "speed": [
        "step: DeiT-Base, batch 4, 46 of 196 patches | 4.00x (400 to 100 ms)",
        "images per second: DeiT-Tiny, PRI of 7 images a trajectory, over dense eager | 20.0x (1.0 to 20.)",
    ],
    "steps": ["DeiT-Base, batch 4, 46 of 196 patches | 400 | 200 | 100 | 4.00x | 2.00x | 50 %"],
    "stages": ["DeiT-Base, batch 4, all patches | 400 | 200 | 100 | 4.00x | 2.00x | 50 %"],
    "scaling": ["DeiT-Base, batch 4, 46 of 196 patches, depth 24 | 400 | 200 | 100 | 4.00x | 2.00x | 50 %"],
    "images-per-second": ["DeiT-Tiny PRI v=7 | 10.0000 | 20.0000 | 2.00x | 20.0x | 10.0x"],
    "whole-runs": ["DeiT-Tiny dense, batch 4 | 1.0000 | 2.0000 | 2.00x | 50 % | 2 and 6 | 3"],
    "memory": ["DeiT-Base, batch 8, all patches | 100 | 40 (40 %) | 20 (20 %) | 200 | 80 (40 %) | 40 (20 %)"],
    "operations": ["attention, 4x47 tokens | float32 | cpu | 300 | 100 | 3.00x | 25 % | eager 200"],
    "verdicts": ["attention forward | triton | bfloat16 | d64 n64 | correct | 1.50x"],
    "evidence-digits": [
        "Gaussian noise | 0.1 |  | 55.0 ± 7.1 | 55.0 | 55.0 ± 7.1 | 30.0 ± 14.1 | 55.0 ± 7.1 | 55.0 ± 7.1",
        "SMI | 47.5 ± 0.7 | 3.50x | 55.0 ± 7.1 | 55.0 | 55.0 ± 7.1 | 91.0 ± 1.4 | 55.0 ± 7.1 | 55.0 ± 7.1",
    ],
    "evidence-cifar10": [
        "images | core-seconds | over dense | teacher agrees | W4/A8 | W4/A3 | copy | agrees, a_tv 5e-3 | W4/A3, 5e-3 | copy, 5e-3",
        "Gaussian noise | 0.1 |  | 55.0 ± 7.1 | 55.0 | 55.0 ± 7.1 | 30.0 ± 14.1 |  |  | ",
        "SMI | 48 ± 1 | 3.50x | 55.0 ± 7.1 | 55.0 | 55.0 ± 7.1 | 91.0 ± 1.4 | 55.0 ± 7.1 | 55.0 ± 7.1 | 71.0 ± 1.4",
    ],
    "evidence": ["cifar10, a_tv 0.005: SMI | 47.5 ± 0.7 | 3.50x" + " | 55.0 ± 7.1" * 6 + " | 71.0 ± 1.4" + " | 55.0 ± 7.1" * 2],
    "evidence-imagenet": [
        "images | core-seconds | over dense | teacher agrees | W8/A8, published | W8/A8",
        "SMI | 48 ± 1 |  | 76.0 | 76.0 ± 2.5 | 76.0 ± 2.5",
    ],
    "evidence-imagenet-paired": ["SMI | -1.0 ± 1.2 (p = 0.100) | +2.0 ± 1.0 (p < 0.001)"],
    "evidence-imagenet-published": ["SMI | -2.0 | +0.0 | -8.1 | "],
    "ranges": [
        "real images | minmax | 50.0 ± 2.0 | ",
        "PRI v=4, 400 iterations | minmax | 50.0 ± 2.0 | -5.0 ± 2.0 (p = 0.030)",
        "PRI v=4, 400 iterations, 8 images, a_tv 0.005, noise of 0.5 on the pixels, 32 noise images beside, scores as with real images | "
        "percentile 99.9 | 50.0 ± 2.0 | -5.0 ± 2.0 (p = 0.030)",
    ],
    "ranges-widths": ["residual sums | 1.50 (1.50 to 1.50) | 2.00 (2.00 to 2.00) | 0.50 (0.50 to 0.50)"],
    "ranges-residual": ["0 | -1.0 to 1.0 | -1.5 to 1.5 | -2.0 to 2.0 | -0.5 to 0.5"],
    "demo": [
        "PRI v=4, patches chosen at random | 75 % | 8.0 | 10.5 | 2.80x | 4.40x | 90.0 % | 99.0 % | 88.0 %",
        "real images | 0 % |  |  |  |  | 100.0 % |  | ",
    ],
    "claims": [
        "DeiT-Base SMI | 3.79x | 3.97x | 3.80x (3.70-3.90): pass | not measured | 3.00x (2.90-3.10): fail",
        "DeiT-Base PRI v=7 | 10.00x | 12.42x | 11.00x (10.90-11.10): pass | not measured | 9.00x (8.90-9.10): fail",
    ],
    "int8": ["digits | 2 | 20.0 | 10.0 | 2.00x | 1.90x | 99.0 % | 98.0 % | 97.0 % | 100.0 % | same bits"],
    "agreement": ["PRI v=4 | fused float32 | 252 | 3 | 99.0 % | 0.500 | 90.0 %"],
    "cpu-attention": [
        "47 tokens, batch 4, 12 heads of 64 | bfloat16 | 2 | 8.00 (4.00) | 4.00 (2.00) | 2.00 (1.00) | 1.00 (0.50) | 1.60 (0.80)"
        " | 4.00x (4.00x) | 8.00x (8.00x) | 5.00x (5.00x)"
    ],
    "fuzz": ["files | 1,000 | 2 | 7 | 10 | 70 % | 30 % | 1"],
    "history": ["2026-01-02 | 0123456 | DeiT-Base, batch 4, 46 of 196 patches | 400 | 200 | 100 | 4.00x | 2.00x | 50 %"],
    "older": [" | 0123456+ | DeiT-Tiny SMI | reference | 2.500 | 2.20x | 4.40x"],
    "throughput": ["DeiT-Tiny/16 dense | 7.33 (1.00x) | 1000.000 (1.00x), batch 4, whole runs | 2000.000 (1.00x), batch 4, whole runs | 2.00x"],
    "flops": ["DeiT-Base/16 SMI | 1578.97 | 1578.97 | 15.22 | 16.82"],
    "paper-memory": ["DeiT-Base/16 dense | 4097 MB | 105 / 210 MB, batch 8 | 42 / 84 MB, batch 8 | 21 / 42 MB, batch 8 | 40% / 40% | 20% / 20%"],
    "rebirth": ["DeiT-Tiny/16 PRI v=7 | up to 10× over dense, 2× over SMI | 10.00000 | 20.00000 | 10.00x | missing | 20.00x"],
    "goals": ["step: deit-base, batch 4, 46 patches, over eager | 3.3x | 4.00x (4.00-4.00) | 50% (float32)"],
}


@pytest.mark.parametrize("name", documents.TABLES)
def test_each_table_from_its_rows(name):
    text = as_markdown(make(name, documents.TABLES, ROWS))
    for line in LINES[name]:
        assert f"| {line} |" in text


def test_each_table_names_the_processor():
    for name in documents.TABLES:
        if name != "flops":  # which are counted
            text = as_markdown(make(name, documents.TABLES, ROWS))
            assert "easured on Y, sm_90, torch 2.0" in text if name == "verdicts" else "easured on X, AVX2" in text


def test_the_picture_of_imagenet(repository, monkeypatch):
    """Drawn from the rows; nothing is drawn of none, or of columns that no row has."""
    monkeypatch.setattr(command, "read_all", lambda: [row for row in ROWS if row["kind"] != "evidence"])
    assert command.main(["--picture"]) == 1
    assert not (repository / "evidence-imagenet.png").exists()
    more = [row | {"config": row["config"] | {"iterations": 200}} for row in made.imagenet()]
    monkeypatch.setattr(command, "read_all", lambda: [*ROWS, *more])
    assert command.main(["--picture"]) == 0
    assert (repository / "evidence-imagenet.png").read_bytes().startswith(b"\x89PNG")


def test_tables_are_rendered_between_their_markers():
    text = f"Before.\n\n{BEGIN.format('steps')}old\n{END}\n\nAfter.\n"
    done, changed, refused = render(text, documents.TABLES, ROWS)
    assert (changed, refused) == (["steps"], [])
    assert done.startswith(
        "Before.\n\n<!-- table: steps (make tables) -->\nMeasured on X, AVX2, 2 threads, torch 2.0, 2026-01-02, commit 0123456.\n\n| step |"
    )
    assert done.endswith(f"|\n{END}\n\nAfter.\n")
    assert render(done, documents.TABLES, ROWS) == (done, [], [])


def test_a_changed_digit_is_noticed():
    text = "".join(f"{BEGIN.format(name)}{END}\n" for name in ("steps", "memory"))
    done = render(text, documents.TABLES, ROWS).text
    assert render(done.replace("| 400 |", "| 401 |"), documents.TABLES, ROWS).changed == ["steps"]
    assert render(done, documents.TABLES, [*ROWS, *made.step(ms=101.0)]).changed == ["steps"]


def test_what_cannot_be_rendered_is_refused():
    rows = [row for row in ROWS if row["kind"] != "demo"]
    for name, reason in {"stepz": "there is no table stepz: choose one of speed, steps", "demo": "the table demo has no rows"}.items():
        text = f"{BEGIN.format(name)}old\n{END}\n{BEGIN.format('int8')}{END}"
        made = render(text, documents.TABLES, rows)
        assert made.text.startswith(f"{BEGIN.format(name)}old\n{END}")
        assert made.changed == ["int8"]  # the others are rendered all the same
        assert made.refused[0].startswith(reason)
    for text in (f"{BEGIN.format('steps')}| 1 |", f"{BEGIN.format('steps')}{BEGIN.format('memory')}{END}"):
        with pytest.raises(InputError, match="the table steps has no end"):
            render(text, documents.TABLES, rows)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A root with one document and the result file of one device."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "ROOT", tmp_path)
    record.append(tmp_path / "x.jsonl", ROWS)
    (tmp_path / "README.md").write_text(f"{BEGIN.format('int8')}{END}\n")
    return tmp_path


def test_the_command_writes_and_checks(repository, capsys):
    assert command.main(["--check"]) == 1
    assert "README.md: the table int8 differs from the rows: run make tables" in capsys.readouterr().out
    assert command.main([]) == 0
    assert "| digits | 2 |" in (repository / "README.md").read_text()
    assert command.main(["--check"]) == 0
    (repository / "README.md").write_text(f"{BEGIN.format('no-such')}{END}\n")
    assert command.main([]) == 1
    assert "there is no table no-such" in capsys.readouterr().err


def test_unread_rows_are_listed(repository, capsys):
    assert command.main(["--unread"]) == 0
    record.append(repository / "x.jsonl", [made.at() | {"kind": "novel", "case": "a case"}])
    assert command.main(["--unread"]) == 1
    assert "novel a case" in capsys.readouterr().out


def test_a_later_measurement_supersedes_an_earlier_one():
    old, new = made.step(ms=300.0), made.step(ms=100.0, run="2026-02-02", time="2026-02-02")
    (step,) = current(old + new, "step")
    assert step.rows == new
    assert current(new + old, "step")[0].rows == new  # of two files
    (before,) = superseded(old + new)
    assert before.rows == old
    text = as_markdown(make("older", documents.TABLES, old + new))
    assert "| 2026-01-02 | 0123456 | DeiT-Base, batch 4, 46 of 196 patches | 1200 | 600 | 300 | 4.00x | 2.00x | 50 % |" in text
    assert "| 100 |" not in text
    assert [line[5] for line in make("history", documents.TABLES, old + new)[0].lines] == ["300", "100"]


def test_processors_do_not_supersede_one_another():
    other = made.step(ms=50.0, device_class="cpu-avx512-bf16-amx-1threads")
    assert superseded(made.step() + other) == []
    first, second = make("steps", documents.TABLES, made.step() + other)
    assert (first.lines[0][3], second.lines[0][3]) == ("100", "50")
    (speed,) = make("speed", documents.TABLES, made.step() + other)
    assert speed.columns == ["over eager", "X, AVX2, 2 threads", "X, AVX512 with BF16 and AMX, 1 thread"]
    newer = [row | {"device": "Z", "time": "2026-02-02"} for row in made.demo()]
    assert [table.rows for table in make("demo", documents.TABLES, newer + made.demo())] == [made.demo(), newer]


def test_what_no_processor_decides_is_superseded_by_any():
    newer = [row | {"device": "Z", "time": "2026-02-02"} for row in made.agreement()]
    (table,) = make("agreement", documents.TABLES, newer + made.agreement())
    assert table.rows == newer


def test_where_and_when_in_words():
    assert processor(made.verdict()[0]) == "Y, sm_90"
    assert processor(made.method()[0]) == "X, AVX2, 1 thread"
    assert processor(made.int8()[0]) == "X, AVX2"
    changed = made.step(dirty=True, run="2026-01-04", commit="abcdefgh")
    assert commit(changed[0]) == "abcdefg+"
    assert measured_on(made.step() + changed) == "X, AVX2, 2 threads, torch 2.0, 2026-01-02 to 2026-01-04, commits 0123456, abcdefg+"


def test_a_refused_side_leaves_its_cells_empty():
    ours, eager, compiled = made.step()
    refused = {key: compiled[key] for key in compiled if key not in ("ms", "share_of_products")} | {"not_timed": "no compiler"}
    del ours["over_compiled"]
    assert "| 400 |  | 100 | 4.00x |  | 50 % |" in as_markdown(make("steps", documents.TABLES, [ours, eager, refused]))


def test_the_documents_are_as_the_rows_give_them(capsys):
    assert command.main(["--check"]) == 0, capsys.readouterr()


def test_no_row_is_read_by_nobody(capsys):
    assert command.main(["--unread"]) == 0, capsys.readouterr().out


def test_tables_need_no_order_of_keys():
    """Rows come from JSON: nothing depends on more than their values."""
    again = json.loads(json.dumps([dict(sorted(row.items())) for row in ROWS]))
    for name in documents.TABLES:
        assert as_markdown(make(name, documents.TABLES, again)) == as_markdown(make(name, documents.TABLES, ROWS))
