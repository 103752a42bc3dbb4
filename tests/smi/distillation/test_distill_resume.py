"""Knowledge transfer that is interrupted and killed: it ends like a run that was not, and folders of other runs are not mixed with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import smi
from smi.distillation import loop, partly_fresh, small_student
from smi.distillation.training_state import load_state, save_state
from smi.errors import InputError, RunError
from smi.files import read_tensors
from tests.conftest import small_vit
from tests.smi.distillation.distilling import QUICK, make_images, timeless

ROOT = Path(__file__).parents[3]


def stopped_at(step):
    def on_step(done, loss):
        if done == step:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("at", [1, 4, 5, 11])
def test_an_interrupted_run_ends_like_one_that_was_not(vit, tmp_path, at):
    made = []

    def source(number):
        made.append(number)
        return make_images(24, seed=number)

    student = partly_fresh(vit, 1)
    whole = smi.distill(vit, student, source, refresh_every=3, **QUICK)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        smi.distill(vit, student, source, refresh_every=3, output=tmp_path, on_step=stopped_at(at), **QUICK)
    resumed = smi.distill(vit, student, source, refresh_every=3, output=tmp_path, **QUICK)
    assert timeless(resumed.curve) == timeless(whole.curve)
    seconds = [row["seconds"] for row in resumed.curve]
    assert seconds == sorted(set(seconds))  # of both sittings
    assert all(torch.equal(weight, resumed.student.state_dict()[name]) for name, weight in whole.student.state_dict().items())
    if at > 4:  # a state had been written: no round is made twice
        assert made == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.jsonl", "model.json", "model.safetensors", "result.json"]
    assert [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()] == resumed.curve
    again = smi.distill(vit, student, source, refresh_every=3, output=tmp_path, on_step=stopped_at(1), **QUICK)  # nothing is left to do
    assert again.record() == resumed.record()


@pytest.mark.parametrize("left", [".state.safetensors.7.tmp", ".tmpAb3dEf", "pool-000000"])
def test_a_run_that_was_killed_while_it_wrote_its_first_state_goes_on(vit, tmp_path, left):
    (tmp_path / left).mkdir() if left.startswith("pool") else (tmp_path / left).write_bytes(b"half")
    assert smi.distill(vit, small_student(vit), make_images(), output=tmp_path, **QUICK).steps == 12


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
import smi
from smi.distillation import partly_fresh
from tests.conftest import small_vit
from tests.smi.distillation.distilling import make_images

folder, log = sys.argv[1], sys.argv[3]
random.seed(0)
kills = 0


def taken():
    return len(open(log).readlines()) if os.path.exists(log) else 0


def ended(child):  # it may be through before it is killed
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


while True:
    child = os.fork()
    if child == 0:
        teacher = small_vit()
        smi.distill(teacher, partly_fresh(teacher, 1), make_images(), preset="published", lr=0.01, steps=60, batch_size=8, eval_every=3,
                    output=folder, progress=False, on_step=lambda step, loss: open(log, "a").write(f"{step}\\n"))
        os._exit(0)
    if kills < 10:
        started, steps = taken(), random.randint(1, 6)
        while taken() < started + steps and not ended(child):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        print(kills)
        sys.exit(os.WEXITSTATUS(status))
    kills += 1
"""


@pytest.mark.slow
def test_killed_up_to_ten_times_at_random_moments(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same order of additions in both processes
    script, log = tmp_path / "killed.py", tmp_path / "steps"
    script.write_text(KILLED)
    kills = subprocess.run([sys.executable, script, tmp_path / "out", ROOT, log], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    assert int(kills) >= 5  # a busy machine may look away until all is done
    taken = [int(line) for line in log.read_text().split()]
    assert len(taken) > 60  # steps after the last state were taken again, so there were kills in the middle
    assert any(step > 3 and step <= before for before, step in zip(taken, taken[1:], strict=False))
    teacher = small_vit()
    whole = smi.distill(
        teacher, partly_fresh(teacher, 1), make_images(), preset="published", lr=0.01, steps=60, batch_size=8, eval_every=3, progress=False
    )
    torch.set_num_threads(threads)
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weight, kept[name]) for name, weight in whole.student.state_dict().items())
    assert timeless(json.loads((tmp_path / "out" / "result.json").read_text())["result"]["curve"]) == timeless(whole.curve)


def test_a_folder_with_another_run_is_not_mixed(vit, tmp_path):
    images = make_images()
    with pytest.raises(KeyboardInterrupt):
        smi.distill(vit, small_student(vit), images, output=tmp_path, on_step=stopped_at(6), **QUICK)
    with pytest.raises(InputError, match="run with other settings"):
        smi.distill(vit, small_student(vit), images, output=tmp_path, **{**QUICK, "batch_size": 4})
    with pytest.raises(InputError, match="run with other images"):
        smi.distill(vit, small_student(vit), make_images(seed=1), output=tmp_path, **QUICK)
    smi.distill(vit, small_student(vit), make_images(seed=1), output=tmp_path, force=True, **QUICK)
    (tmp_path / "result.json").unlink()
    with pytest.raises(InputError, match="not empty"):
        smi.distill(vit, small_student(vit), images, output=tmp_path, **QUICK)


@pytest.mark.parametrize(
    "held",
    [
        {"model.safetensors": "mine", "model.json": "{}"},
        {"notes.txt": "mine"},
        {"state.safetensors": "not ours"},
        {"result.json": '{"accuracy": 1}', "curve.jsonl": "mine"},
        {"result.json": "[1]"},
        {"pool-party/photo.png": "mine"},
        {"images.json": "{}"},
    ],
    ids=lambda held: next(iter(held)),
)
def test_force_empties_no_folder_but_a_distillations(held, vit, tmp_path):
    for name, text in held.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for force in (False, True):
        with pytest.raises(InputError, match="is not empty and holds no distillation"):
            smi.distill(vit, small_student(vit), make_images(), output=tmp_path, force=force, **QUICK)
    assert {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.*") if path.is_file()} == held


def test_force_keeps_what_a_distillation_did_not_write(vit, tmp_path):
    once = {**QUICK, "steps": 1}
    smi.distill(vit, small_student(vit), make_images(), output=tmp_path, **once)
    mine = [tmp_path / "notes.txt", tmp_path / "pool-party" / "photo.png"]
    mine[1].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    first = (tmp_path / "model.safetensors").read_bytes()
    smi.distill(vit, small_student(vit, seed=1), make_images(), output=tmp_path, force=True, **once)
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    assert (tmp_path / "model.safetensors").read_bytes() != first


def test_states_are_written_whole(vit, tmp_path, monkeypatch):
    optimiser = torch.optim.SGD(vit.parameters(), lr=0.1)
    loop.save_state(tmp_path / "state.safetensors", vit, optimiser, {"step": 1})
    before = (tmp_path / "state.safetensors").read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smi.distillation.training_state.save_file", half)
    with pytest.raises(RunError, match="No space left"):
        loop.save_state(tmp_path / "state.safetensors", vit, optimiser, {"step": 2})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize(
    ("name", "value"),
    [("plain", 3), ("groups", [{"params": 3}]), ("groups", {}), ("progress", "["), ("plain", {"x": {}}), ("plain", {"0": 3})],
)
def test_a_damaged_state_is_refused(name, value, tmp_path):
    """Whatever of its JSON is of another type."""
    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    save_state(tmp_path / "state.safetensors", model, optimiser, {"step": 1})
    tensors, meta = read_tensors(tmp_path / "state.safetensors")
    meta[name] = value if isinstance(value, str) else json.dumps(value)
    save_file(tensors, tmp_path / "state.safetensors", metadata=meta)
    with pytest.raises(InputError, match="cannot be resumed from"):
        load_state(tmp_path / "state.safetensors", model, optimiser)


@pytest.mark.parametrize("change", [{"asked": 3}, {"result": [1]}, {"result": {"steps": 1}}])
def test_a_damaged_result_is_refused(change, vit, tmp_path):
    images = smi.invert(vit, method="dense", num_images=2, iterations=1, progress=False)
    smi.distill(vit, vit, images, steps=1, output=tmp_path, progress=False)
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(result | change))
    with pytest.raises(InputError, match="is damaged"):
        smi.distill(vit, vit, images, steps=1, output=tmp_path, progress=False)
