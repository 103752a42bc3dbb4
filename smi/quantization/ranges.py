"""What is quantised, to how many bits and over which range: a torchao quantizer and the observers that it places. Needs torchao."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from .points import Places
from .recipe import Recipe

SHRINKS = 100  # candidate ranges of the MSE search, evenly spaced down to a hundredth of the observed range


class PublishedObserver(MinMaxObserver):
    """The range from the least to the greatest value seen, which need not hold zero: scale = (max - min) / (2^k - 1), zero = -round(min / scale)."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        scale = torch.maximum((self.max_val - self.min_val) / (self.quant_max - self.quant_min), self.eps)
        return scale, torch.clamp(-torch.round(self.min_val / scale), self.quant_min, self.quant_max).long()


class PercentileObserver(HistogramObserver):
    """The range between two quantiles of everything seen: `percentile` percent of it lie above the lower end, as many below the upper."""

    def __init__(self, percentile: float, **options: Any) -> None:
        super().__init__(**options)
        self.percentile = percentile

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        share = self.histogram.double().cumsum(0) / self.histogram.double().sum()
        cut = 1 - self.percentile / 100
        first = int((share <= cut).sum())  # bins that lie wholly below the lower quantile
        last = int((share < 1 - cut).sum())
        width = (self.max_val - self.min_val) / self.bins
        return self.min_val + width * first, self.min_val + width * (min(last, self.bins - 1) + 1)


class MseObserver(HistogramObserver):
    """The range, shrunk towards zero, whose quantisation error over the histogram is least in the mean square."""

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        width = (self.max_val.double() - self.min_val.double()) / self.bins
        values = self.min_val.double() + width * (torch.arange(self.bins, device=self.histogram.device) + 0.5)
        best, least = (self.min_val, self.max_val), float("inf")
        for step in range(SHRINKS, 0, -1):
            low, high = self.min_val * step / SHRINKS, self.max_val * step / SHRINKS
            scale, zero = self._calculate_qparams(low, high)
            coded = torch.clamp(torch.round(values / scale) + zero, self.quant_min, self.quant_max)
            error = (((coded - zero) * scale - values).square() * self.histogram).sum().item()
            if error < least:
                best, least = (low, high), error
        return best


class MseWeightObserver(PerChannelMinMaxObserver):
    """Per output channel, the symmetric range whose quantisation error is least in the mean square."""

    def forward(self, weight: Tensor) -> Tensor:
        self.weight = weight.detach().flatten(1)
        return super().forward(weight)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        scales, zeros = super().calculate_qparams()
        best, least = scales, torch.full_like(scales, float("inf"))
        for step in range(SHRINKS, 0, -1):
            scale = torch.maximum(scales * step / SHRINKS, self.eps)
            coded = torch.clamp(torch.round(self.weight / scale[:, None]), self.quant_min, self.quant_max)
            error = (coded * scale[:, None] - self.weight).square().sum(1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best, zeros


def weight_spec(recipe: Recipe) -> QuantizationSpec:
    """Per output channel, symmetric: codes from -(2^(b-1) - 1), in the published recipe -2^(b-1), to 2^(b-1) - 1."""
    least, most = recipe.weight_codes
    observer = {"minmax": PerChannelMinMaxObserver, "mse": MseWeightObserver}[recipe.weight_ranges]
    return QuantizationSpec(torch.int8, observer, least, most, torch.per_channel_symmetric, ch_axis=0)


def activation_spec(recipe: Recipe) -> QuantizationSpec:
    """Per tensor, asymmetric: codes from 0 to 2^b - 1."""
    observers = {
        "minmax": PublishedObserver if recipe.published else MinMaxObserver,
        "mse": MseObserver,
        "percentile": PercentileObserver.with_args(percentile=recipe.percentile),
    }
    return QuantizationSpec(torch.uint8, observers[recipe.ranges], 0, 2**recipe.activation_bits - 1, torch.per_tensor_affine)


class ViTQuantizer(Quantizer):
    """Quantises the weights of every linear layer, and the activations that the recipe names."""

    def __init__(self, places: Places, recipe: Recipe):
        super().__init__()
        self.places, self.recipe = places, recipe

    def annotate(self, model: GraphModule) -> GraphModule:
        activation, weight = activation_spec(self.recipe), weight_spec(self.recipe)
        greatest = activation_spec(replace(self.recipe, ranges="minmax"))  # of softmax weights, from which their codes count down
        inputs: dict[Node, dict] = {node: {node.args[1]: weight} for node in self.places.linears.values()}
        for name, (node, argument) in self.places.inputs.items():
            inputs.setdefault(node, {})[node.args[argument]] = greatest if self.recipe.reparametrized and name.endswith(".weights") else activation
        made = set(self.places.outputs.values())
        for node in made.union(inputs):
            output = activation if node in made else None
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(inputs.get(node, {}), output, _annotated=True)
        return model

    def validate(self, model: GraphModule) -> None:
        if not self.places.linears:
            raise ValueError("the exported graph holds no linear layer")
