"""The cases of `python -m bench.fuzz`, a few of each kind, drawn and shrunk by Hypothesis: the same ones every time.

Whole runs, distillation and quantisation are left to campaigns: each of their cases takes a second.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from bench.fuzz import files, kinds, models
from bench.fuzz import settings as doors
from bench.fuzz.draw import strategy

EXAMPLES = {"files": 40, "models": 5, "settings": 24}  # of each kind of file, entry point and door
DEAR = {
    "evaluate": 8,
    "compiled library": 6,
    "quantized.json, simulated": 15,
    "simulated weights": 15,
    "result.json": 10,
    "student.safetensors": 10,
    "checkpoint by name": 10,
}


@pytest.fixture(scope="module")
def file_targets(tmp_path_factory):
    return files.targets(tmp_path_factory.mktemp("samples"))


@pytest.fixture(autouse=True)
def one_thread_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hold(targets, folder):
    """Every case of these targets, parts of one name, is computed or refused."""

    def make(draw):
        number = draw.below(len(targets))
        return targets[number].part, number, targets[number].make(draw)

    @settings(
        max_examples=DEAR.get(targets[0].name, EXAMPLES[targets[0].what]),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy(make))
    def cases(case):
        targets[case[1]].check(case[2], folder)

    cases()


@pytest.mark.parametrize("name", [kind.name for kind in kinds.every()])
def test_damaged_files_are_refused_or_read(name, file_targets, tmp_path):
    hold([target for target in file_targets if target.name == name], tmp_path)


@pytest.mark.parametrize("name", ["accelerate", "drop_in", "forward_sparse"])
def test_models_are_computed_as_they_are_or_refused(name, tmp_path):
    hold([target for target in models.targets(None, "") if target.name == name], tmp_path)


@pytest.mark.parametrize("name", [door.name for door in doors.DOORS if door.name not in ("distill", "quantize")])
def test_settings_are_refused_or_the_run_succeeds(name, tmp_path):
    hold([target for target in doors.targets(None, name) if target.name == name], tmp_path)
