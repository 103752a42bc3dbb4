"""How the updates of a stage are run: one after another, or on a GPU as replays of one captured graph, in which the host decides nothing."""

import torch
from torch import Tensor

from ..kernels import graphs
from ..models.module import Classifier
from .step import Step, is_standard

WARM_UP = 2  # updates before the capture: kernels compile, workspaces are made


class Runner:
    """The updates of one stage. table: int [T, 3], the run's augmentations; curve: float [T], where losses go; first: the stage's first iteration."""

    def __init__(self, step: Step, table: Tensor, curve: Tensor, first: int):
        self.step, self.table, self.curve = step, table, curve
        self.at = torch.tensor([first], device=table.device)
        own = isinstance(step.vit, Classifier)  # whose modules might wait for the device
        self.graph = _captured(self) if table.device.type == "cuda" and is_standard(step.losses) and not own else None

    def __call__(self) -> None:
        """Make the next update; its loss goes to the curve."""
        self.once() if self.graph is None else self.graph.replay()

    def once(self) -> None:
        loss = self.step.run((self.at + 1)[0], self.table.index_select(0, self.at)[0])
        self.curve.index_copy_(0, self.at, loss.reshape(1).to(self.curve.dtype))
        self.at += 1

    def state(self) -> tuple[Tensor, ...]:
        """What an update changes."""
        return self.step.images, *self.step.moments, self.at


def _captured(runner: Runner) -> torch.cuda.CUDAGraph:
    """One update as a graph. What the updates of the warm-up changed is put back."""
    before = [tensor.clone() for tensor in runner.state()]

    def undo() -> None:  # after each: the stage may be a single update
        for tensor, value in zip(runner.state(), before, strict=True):
            tensor.copy_(value)

    return graphs.capture(runner.once, runner.at.device, WARM_UP, undo)
