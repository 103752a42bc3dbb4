"""Images are made until the ranges settle: never early where they keep growing, and soon where nothing new comes."""

import pytest
import torch

import smi
from smi.cli.main import run
from smi.cli.quantize import print_quantized, run_quantize
from smi.quantization import load_quantized, settle
from smi.quantization.recipe import PUBLISHED
from smi.quantization.settle import ITERATIONS, MAX_IMAGES, MOST_OF_ONE, ON_AVERAGE, ROUND, WINDOW, inverting
from smi.teachers import digits
from tests.conftest import small_vit

pytest.importorskip("torchao")

STILL = {f"point {i}": (-1.0, 1.0) for i in range(200)}


class Seen:
    """A calibration of which the ranges are given."""

    def __init__(self, ranges):
        self.given, self.images, self.rounds = ranges, 0, -1

    def see(self, images):
        self.images, self.rounds = self.images + ROUND, self.rounds + 1

    def ranges(self):
        return self.given(self.rounds)


def rounds(ranges, **options):
    return settle.calibrate_until_settled(Seen(ranges), lambda number: None, **options)


@pytest.mark.fast
@pytest.mark.parametrize(
    "ranges",
    [
        lambda k: dict.fromkeys(STILL, (-(1.011**k), 1.0)),  # all of them, by a little
        lambda k: dict.fromkeys(STILL, (-1.0, 1.0 + 0.012 * k)),
        lambda k: STILL | {"point 3": (-1.0, 1.2**k)},  # one of two hundred
        lambda k: STILL | {"point 3": (-1.0, 1.0 + (k // WINDOW) * 1.7 ** (k // WINDOW))},  # by leaps, still for all but a round of a window
        lambda k: STILL | dict.fromkeys(list(STILL)[:20], (-(1.2**k), 1.0)),  # a tenth
    ],
)
def test_it_never_stops_while_ranges_grow(ranges):
    found = rounds(ranges)
    assert (found["images"], found["settled"]) == (MAX_IMAGES, False)


@pytest.mark.fast
def test_it_stops_when_nothing_widens_any_more():
    assert rounds(lambda k: STILL)["rounds"] == WINDOW + 1
    found = rounds(lambda k: dict.fromkeys(STILL, (-1.0, 2.0 - 0.5**k)))  # every step half the one before
    assert found["settled"]
    assert WINDOW + 1 < found["rounds"] < MAX_IMAGES // ROUND
    assert found["on_average"] <= ON_AVERAGE
    assert found["most_of_one"] <= MOST_OF_ONE


def test_a_model_whose_ranges_keep_growing_sees_all_images():
    """A source of images that are brighter from round to round; in another model the same ones again."""
    model, told = small_vit(depth=1), []
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    grown = smi.quantize(model, lambda number: 1.3**number * images, recipe=PUBLISHED, max_images=16, on_round=told.append)
    assert [at.images for at in told] == [4, 8, 12, 16]
    assert not grown.facts.calibration["settled"]
    still = smi.quantize(model, lambda number: images, recipe=PUBLISHED)
    assert (still.facts.calibration["rounds"], still.facts.calibration["settled"]) == (WINDOW + 1, True)


def test_a_model_is_quantised_by_its_own_images(tmp_path, capsys):
    """The digits teacher, W8/A8 under the published recipe, with progress; the folder tells what calibrated it."""
    pytest.importorskip("sklearn")
    about = {"recipe": PUBLISHED, "evaluation": "digits", "output": tmp_path / "q", "progress": True}
    result = run_quantize(digits(), seed=3, max_images=16, **about)
    measured, shown = result["evaluation"], capsys.readouterr().err
    assert measured["int8"] > measured["full_precision"] - 0.015
    assert shown.splitlines() == ["calibration  8 images", "calibration  16 images"]
    assert result["calibration"] == load_quantized(tmp_path / "q").facts.calibration
    print_quantized(result)
    assert "16 images made; the ranges have not settled" in capsys.readouterr().out
    images = inverting(digits(), 3)(0)
    assert (len(images), images.provenance["iterations"], images.provenance["method"]) == (ROUND, ITERATIONS, "pri")
    assert run(["quantize", "-n", "8"]) == 2
    assert "num-images counts the images of --images" in capsys.readouterr().err
