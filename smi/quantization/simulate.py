"""Post-training quantisation, calibrated with synthetic or real images, on torchao's PT2E.

export (patches, index) -> logits  ->  observers placed by torchao  ->  a forward on the retained patches  ->  integers and their scales
(calibrate.py)

The graph ends there: codes and scales go into a module of their own (network.py), which is what runs and what is saved.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..images.sparse_images import SparseImages
from ..models.unwrap import unwrapped
from ..plain import whole
from ..surroundings import at_the_door, seeded
from .calibrate import Calibration
from .export import describe_for
from .int8 import Int8ViT
from .model import Facts, Images, as_patches, check_images
from .network import QuantizedLinear, QuantizedViT
from .recipe import LINEAR_INPUTS, Recipe
from .settle import FIRST_ROUNDS, MAX_IMAGES, Round, Source, after, calibrate_until_settled, inverting


@at_the_door
def quantize(
    model: nn.Module,
    images: Images | Source | None = None,
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    ranges: str | None = None,
    percentile: float = Recipe.percentile,
    weight_ranges: str | None = None,
    attention: bool = False,
    recipe: str = LINEAR_INPUTS,
    batch_size: int = 32,
    max_images: int = MAX_IMAGES,
    seed: int = 0,
    on_round: Callable[[Round], None] | None = None,
) -> "SimulatedViT":
    """A quantised copy of a timm ViT, calibrated with `images`.

    images: SparseImages, of which only the retained patches are fed; normalised pixels [M, C, H, W]; or (patches [M, n, C, p, p], index [M, n]).
    A function of a round's number, 0, 1, ..., that returns such images is asked until the ranges of the activations no longer widen, or `max_images`
    were seen. None: the model's own, by short runs of PRI from `seed`. `on_round` is told of each round.
    weight_bits, activation_bits: 2 to 8; weights per output channel and symmetric, activations per tensor and asymmetric.
    recipe: which activations. "linear-inputs": those of the linear layers, as hardware that multiplies integers needs them. "published": all but the
    softmax's output, the residual stream included, by the formulas of PSAQ-ViT's protocol. "reparametrized": for few bits, after RepQ-ViT.
    ranges: of the activations: "minmax" (as published), "percentile" (from the (100 - percentile)-th to the percentile-th) or "mse" (least squared
    error). weight_ranges: "minmax" or "mse". None: "minmax", with recipe="reparametrized" "percentile" and "mse".
    attention: quantise both operands of attention's two GEMMs as well; with recipe="linear-inputs".
    batch_size: images at a time.

    Returns a simulation in float32; its `int8()` multiplies integers on the CPU, `facts.calibration` tells what calibrated it. Raises InputError for
    what does not fit the model and where torchao is missing, RunError with the module that cannot be exported.
    """
    widths = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    how = Recipe.of(recipe, ranges, weight_ranges, percentile=percentile, attention=attention, **widths)
    batch_size, max_images, seed = whole(1)("batch_size", batch_size), whole(1)("max_images", max_images), whole()("seed", seed)
    images = inverting(model, seed) if images is None else images
    vit, inner = describe_for(model, images), unwrapped(model)
    if vit.embed.weight.dtype != torch.float32:
        raise InputError(f"a model to quantise must be float32, this one is {str(vit.embed.weight.dtype).removeprefix('torch.')}")
    facts = Facts.of(vit, how)
    if not callable(images):
        check_images(*as_patches(facts, images))
    with seeded(0, vit.device):  # torchao and torch.export draw from the global generators
        if callable(images):
            first = [images(number) for number in range(FIRST_ROUNDS)] if how.reparametrized else []
            calibration = Calibration(inner, facts, batch_size, first)
            about = calibrate_until_settled(calibration, after(first, images), max_images=max_images, on_round=on_round)
        else:
            calibration = Calibration(inner, facts, batch_size, [images])
            calibration.see(images)
            about = {"images": calibration.images, **({"provenance": images.provenance} if isinstance(images, SparseImages) else {})}
        return SimulatedViT(replace(facts, calibration=about), *calibration.result())


class SimulatedLinear(QuantizedLinear):
    """A linear layer in float32 of the values that its codes and those of its input stand for."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.simulated(x), self.codes.float() * self.scales[:, None], self.bias)


class SimulatedViT(QuantizedViT):
    """A quantised ViT in float32, where every quantised tensor takes the values of its codes."""

    KIND, LINEAR = "simulated", SimulatedLinear

    @at_the_door
    def int8(self) -> Int8ViT:
        """The model of the same codes and scales whose linear layers multiply integers on the CPU. Attention's GEMMs, where they are quantised too,
        multiply the rounded values in float32."""
        return Int8ViT(self.facts, self.tensors(), self.inputs())
