"""What of `python -m bench.gpu` can run without a GPU: which sections it chooses, and a rehearsal of the command itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.measuring import rows_file
from bench.sections import outputs, pack

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def names(*arguments: str) -> list[str]:
    return [section.name for section in gpu.plan_of(gpu.parser().parse_args(list(arguments)))]


def test_key_figures_come_first_and_what_compiles_last():
    for plan in (names(), names("--first")):
        assert plan.index("verdicts") < plan.index("steps") < plan.index("profiles")
        assert plan[-1] == "compiled"
        assert plan[plan.index("profiles") + 1] == "whole" or "--first" in plan
    assert "compiled" not in names("--no-compile")
    only = names("--only", "attention", "layer_norm")
    assert "operations of attention, layer_norm" in only
    assert not any("steps" in name for name in only)
    assert names("--first", "--sections", "whole") == ["whole"]


@pytest.mark.slow
def test_a_rehearsal_of_the_command(tmp_path, capsys, monkeypatch):
    """Processes start, work in small and leave their files; the same command again finds all finished, and one more section is done alone."""
    monkeypatch.setattr(pack, "earlier", list)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ["--first", "--rehearse", "--seconds", "1000", "--out", str(tmp_path), "--sections", "versions"]
    assert gpu.main(arguments) == 0
    assert gpu.main([*arguments, "whole"]) == 0
    assert gpu.main([*arguments, "whole"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in said] == ["versions:", "finished", "whole:", "finished"]
    assert said[-1] == "finished by an earlier call: versions, whole"
    assert outputs.faults(tmp_path) == []
    (file,) = (path for path in tmp_path.glob("*.jsonl") if path.name != outputs.PROGRESS)
    assert {row["kind"] for row in rows_file.read(file)} == {"machine", "carried", "ceilings", "whole"}
    assert (tmp_path / outputs.SUMMARY).read_text().splitlines() == said


def test_runs_from_the_root_without_installation():
    """Only the checkout on the path, no installed package: smi.kernels is found beside smi."""
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    code += "import smi.kernels; print(smi.kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), done.stderr
