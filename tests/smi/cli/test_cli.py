"""The command line: what it prints, how it fails, what it keeps when it is stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import smi
from smi.cli.main import run
from smi.engine import Mode
from smi.models.vit import describe
from smi.teachers import digits
from tests.conftest import fails

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[3]
QUICK = ["--num-images", "4", "--iterations", "14"]
SMALL = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = timm.create_model(SMALL, num_classes=3)
    save_file(model.state_dict(), folder / "good.safetensors")
    torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()}}, folder / "deit.pth")
    broken = dict(model.state_dict())
    broken["extra.weight"] = broken.pop("norm.weight")
    broken["pos_embed"] = torch.zeros(1, 51, 192)
    save_file(broken, folder / "misfit.safetensors")
    bad = {key: value.clone() for key, value in model.state_dict().items()}
    bad["head.weight"][0, 0] = float("nan")
    save_file(bad, folder / "nan.safetensors")
    torch.save({"model": object()}, folder / "code.pth")
    torch.save([1, 2], folder / "list.pth")
    (folder / "text.safetensors").write_text("hello")
    return folder


@pytest.mark.parametrize("method", ["dense", "smi", "pri"])
def test_invert_then_show_then_export(method, tmp_path, capsys):
    assert run(["invert", "-o", str(tmp_path / "out"), "--method", method, *QUICK]) == 0
    assert "4 images" in capsys.readouterr().out
    images = smi.SparseImages.load(tmp_path / "out")
    assert len(images) == 4
    assert images.provenance["model"] == "digits"
    assert run(["show", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert run(["export", str(tmp_path / "out"), "-o", str(tmp_path / "png")]) == 0
    assert len(list((tmp_path / "png").glob("*.png"))) == 4


def test_json_for_machines(tmp_path, capsys):
    assert run(["invert", "-o", str(tmp_path), "--json", *QUICK]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["images"] == 4
    assert printed["provenance"]["method"] == "pri"
    assert run(["info", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["versions"]["smi"] == smi.__version__
    assert {row["operation"] for row in table["kernels"]} >= {"patch_embed", "attention", "image_step"}
    assert all(row["reason"] for row in table["kernels"] if not row["available"])


def test_info_and_help(capsys):
    assert run(["info"]) == 0
    out = capsys.readouterr().out
    assert "attention" in out
    assert "dtype auto is " in out
    assert run([]) == 0
    assert "invert" in capsys.readouterr().out


def test_checkpoints_of_either_kind_and_any_class_count(weights, tmp_path):
    for name in ("good.safetensors", "deit.pth"):
        out = tmp_path / name
        assert (
            run(["invert", "-o", str(out), "--model", SMALL, "--checkpoint", str(weights / name), "-n", "1", "--iterations", "7", "--labels", "2"])
            == 0
        )
    hashes = {smi.SparseImages.load(tmp_path / name).provenance["weights_sha256"] for name in ("good.safetensors", "deit.pth")}
    assert len(hashes) == 1


def test_image_size(tmp_path):
    arguments = ["--model", SMALL, "--random-weights", "--image-size", "64x96", "-n", "1", "--iterations", "7"]
    assert run(["invert", "-o", str(tmp_path), *arguments]) == 0
    assert smi.SparseImages.load(tmp_path).grid == (4, 6)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "vit_tinny_patch16_224"], ["unknown model 'vit_tinny_patch16_224'", "did you mean 'vit_tiny_patch16_224'"]),
        (["--method", "best"], ["unknown method 'best'", "dense, smi, pri"]),
        (["--device", "tpu"], ["device 'tpu' cannot be used"]),
        (["--labels", "1,10"], ["labels must be whole numbers from 0 to 9", "10"]),
        (["--labels", "one"], ["not a list of whole numbers"]),
        (["--division", "65"], ["division must lie between 1 and the number of patches, 64, got 65"]),
        (["--method", "smi", "--prune-at", "5,3"], ["events must come in order", "3 follows 5"]),
        (["--method", "smi", "--prune-at", "1,2,3,4,5,6,7", "--prune-ratio", "0.6"], ["leave at least 1"]),
        (["--num-images", "0"], ["num_images must be", "got 0"]),
        (["--num-images", "many"], ["many"]),
        (["--seed", "-1"], ["seed must be a whole number from 0"]),
        (["--labels", "9" * 30], ["labels must be whole numbers, the classes to invert"]),
        (["--num-images", "1" + "0" * 20], ["num_images must be"]),
        (["--iterations", "1" + "0" * 12], ["iterations must be"]),
        (["--image-size", "\u00b2"], ["is not a size"]),
        (["--tv-weight", "nan"], ["tv_weight must be a finite number"]),
        (["--device", "meta"], ["device 'meta' cannot be used"]),
        (["--model", SMALL, "--random-weights", "--checkpoint", "x.pth"], ["not both"]),
        (["--random-weights"], ["comes with its weights"]),
        (["--model", SMALL + ".nosuchtag"], ["unknown model"]),
        (["--importance", "luck"], ["unknown importance 'luck'"]),
        (["--image-size", "0"], ["'0' is not a size"]),
        (["--model", "swin_tiny_patch4_window7_224", "--random-weights"], ["SwinTransformer is not supported"]),
        (["--model", SMALL, "--random-weights", "--image-size", "50"], ["not a multiple of its patch size"]),
        (["--checkpoint", "/nowhere.safetensors", "--model", SMALL], ["/nowhere.safetensors is not a file"]),
        (["--checkpoint", "x.safetensors"], ["comes with its weights"]),
        (["--colour", "red"], ["--colour"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, parts, tmp_path, capsys):
    fails(capsys, ["invert", "-o", tmp_path / "out", *QUICK, *arguments], 2, *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        (
            "misfit.safetensors",
            ["does not fit", "missing norm.weight", "not in the model extra.weight", "pos_embed is (1, 51, 192) but must be (1, 197, 192)"],
        ),
        ("nan.safetensors", ["NaN", "head.weight"]),
        ("code.pth", ["cannot be read as a checkpoint of plain tensors"]),
        ("list.pth", ["holds no state_dict"]),
        ("text.safetensors", ["cannot be read as a checkpoint"]),
    ],
)
def test_checkpoints_that_do_not_fit(file, parts, weights, tmp_path, capsys):
    fails(capsys, ["invert", "-o", tmp_path / "out", "--model", SMALL, "--checkpoint", weights / file, *QUICK], 2, *parts)
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_fetched(tmp_path, capsys, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to the hub")

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, pretrained=False, **kwargs: unreachable() if pretrained else create(*args, **kwargs))
    fails(capsys, ["invert", "-o", tmp_path / "out", "--model", SMALL, *QUICK], 1, "could not be fetched (no route to the hub)", "checkpoint")


def test_a_network_that_is_no_vit(tmp_path, capsys):
    run_at = ["invert", "--model", "resnet10t", "--random-weights", "--image-size", "32", "--num-images", "1", "--iterations", "4", "--output"]
    fails(capsys, [*run_at, tmp_path / "pri"], 2, "subset of the patches", "method 'dense' takes it")
    assert run([*map(str, [*run_at, tmp_path / "dense"]), "--method", "dense"]) == 0
    images = smi.SparseImages.load(tmp_path / "dense")
    assert (images.image_size, images.sparsity, images.provenance["engine"]) == ((32, 32), 0, "module")


def test_levels_of_architectures(capsys):
    assert run(["models", "resnet10t", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["counts"], found["models"][0]["methods"]) == ({"module": 1}, ["dense", "gaussian"])
    fails(capsys, ["models", "no-such-model"], 2, "no architecture of timm has 'no-such-model' in its name")


@pytest.mark.parametrize("verb", ["invert", "distill", "export"])
def test_what_is_required_is_asked_for(verb, tmp_path, capsys):
    given = {"export": [tmp_path]}.get(verb, [])
    fails(capsys, [verb, *given], 2, "Missing option", "--output")


def test_output_folder_not_empty_or_not_writable(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    fails(capsys, ["invert", "-o", tmp_path, *QUICK], 2, "is not empty", "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    fails(capsys, ["invert", "-o", "/proc/smi", *QUICK], 2, "cannot be written")
    fails(capsys, ["invert", "-o", tmp_path / "mine.txt", *QUICK], 2, "is a file")
    assert run(["invert", "-o", str(tmp_path), "--force", *QUICK]) == 0
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_out_of_memory(tmp_path, capsys, monkeypatch):
    from smi.inversion import memory_estimate

    room = int(memory_estimate.step_memory(describe(digits()), 2, 64, Mode(torch.float32)).beside_weights * memory_estimate.CPU_SLACK) + 1
    monkeypatch.setattr(memory_estimate, "available_memory", lambda device: room)
    dense = ["invert", "-o", tmp_path / "out", "--method", "dense", "-n", "64", "--iterations", "3", "--dtype", "float32"]
    fails(capsys, dense, 1, "out of memory", "--batch-size 2")
    monkeypatch.setattr(memory_estimate, "available_memory", lambda device: 1000)
    fails(capsys, ["invert", "-o", tmp_path / "out", *QUICK], 1, "not even one fits")


def test_out_of_memory_in_the_middle(tmp_path, capsys, monkeypatch):
    from smi.inversion import loop

    def runs_out(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(loop, "run_batch", runs_out)
    fails(
        capsys,
        ["invert", "-o", tmp_path / "out", "--method", "dense", "-n", "64", "--iterations", "3"],
        1,
        "out of memory: a batch of 64",
        "--batch-size",
    )


def test_nothing_to_show(tmp_path, capsys):
    fails(capsys, ["show", tmp_path], 2, "holds no sparse images")
    fails(capsys, ["export", tmp_path / "no", "-o", tmp_path / "out"], 2, "holds no sparse images")
    fails(capsys, ["export", tmp_path, "-o", tmp_path / "out", "--to", "jpeg"], 2, "jpeg")


def test_a_run_that_diverges_names_the_iteration(tmp_path, capsys):
    fails(
        capsys,
        ["invert", "-o", tmp_path / "out", "--tv-weight", "1e308", *QUICK],
        1,
        "the loss is",
        "at iteration 0",
        "no batch was finished, nothing was written",
    )
    assert not (tmp_path / "out").exists()


def test_a_backend_that_cannot_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SMI_BACKEND", "nope")
    fails(capsys, ["info"], 2, "SMI_BACKEND=nope is not a backend")
    monkeypatch.setenv("SMI_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(capsys, ["invert", "-o", tmp_path / "out", *QUICK, "--device", "cpu"], 2, "was asked to run in triton but cannot")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    assert run(["invert", "-o", str(tmp_path / "out"), *QUICK]) == 0
    (tmp_path / "mine.png").write_text("keep")
    capsys.readouterr()
    fails(capsys, ["show", tmp_path / "out", "-o", tmp_path / "mine.png"], 2, "exists", "--force")
    assert (tmp_path / "mine.png").read_text() == "keep"
    fails(capsys, ["demo", "-o", tmp_path], 2, "is not empty")


def test_cost_refuses_what_makes_no_sense(capsys):
    fails(capsys, ["cost", "--batch-size", "-3"], 2, "batch-size must be")
    fails(capsys, ["cost", "--division", "3"], 2, "need --method")


def test_verify_needs_a_gpu(capsys):
    fails(capsys, ["verify", "--device", "cpu"], 2, "needs a CUDA GPU")


def test_an_unexpected_error_is_one_sentence_too(tmp_path, capsys, monkeypatch):
    from smi.images import storage

    monkeypatch.setattr(storage, "load", lambda folder: 1 / 0)
    fails(capsys, ["show", tmp_path], 1, "unexpected ZeroDivisionError", "--traceback")
    with pytest.raises(ZeroDivisionError):
        run(["--traceback", "show", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_keeps_its_finished_batches(tmp_path, stop):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "smi",
        "invert",
        "-o",
        str(out),
        "-n",
        "2000",
        "--batch-size",
        "2",
        "--method",
        "pri",
        "--division",
        "2",
        "--iterations",
        "40",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests that run in the background are started with it ignored
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("images-*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    images = smi.SparseImages.load(out)
    assert len(images) >= 8
    assert len(images) % 4 == 0
    assert images.provenance["complete"] is False
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert err.strip().splitlines()[-1] == f"smi: interrupted: {len(images)} finished images are in {out}; the same command goes on"
    assert run(["show", str(out)]) == 0
