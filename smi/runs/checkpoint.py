"""The state of a batch that is not finished, in one file, so that a killed run goes on within the batch: tensors alone, as safetensors."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import RunError
from ..files import read_tensors, replace_file

FORMAT = "smi.checkpoint/1"
SHARE = 0.02  # of the time, at most, is spent on checkpoints
BESIDE = "beside."  # before the names of what is kept beside the batch's own state


class Checkpoint:
    """The checkpoint of one batch. every: seconds between two, 0 for none. beside: buffers of the caller's that are saved with it and read back in
    place."""

    def __init__(self, path: Path, every: float, beside: Mapping[str, Tensor] | None = None):
        self.path, self.every = path, every
        self.beside = {BESIDE + name: tensor for name, tensor in (beside or {}).items()}
        self.pause, self.last = every, time.monotonic()

    def due(self) -> bool:
        """Whether it is time for the next one."""
        return self.every > 0 and time.monotonic() - self.last >= self.pause

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint. Raises RunError where that fails."""
        began = time.monotonic()
        # clones: tensors that share memory are refused
        held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in {**state, **self.beside}.items()}
        try:
            replace_file(self.path, lambda path: save_file(held, path, metadata={"format": FORMAT}), durable=True)
        except (OSError, SafetensorError) as error:
            raise RunError(f"writing {self.path} failed ({getattr(error, 'strerror', None) or error})") from error
        self.last = time.monotonic()
        self.pause = max(self.every, (self.last - began) * (1 / SHARE - 1))

    def load(self, names: Sequence[str]) -> dict[str, Tensor] | None:
        """The state that was saved; None where there is none with these names, or it is damaged: the batch is then made from its start, with the same
        result."""
        try:
            held, about = read_tensors(self.path)
        except (OSError, SafetensorError):
            return None
        beside = all(name in held and (held[name].shape, held[name].dtype) == (tensor.shape, tensor.dtype) for name, tensor in self.beside.items())
        return held if about.get("format") == FORMAT and beside and all(name in held for name in names) else None

    def restore_beside(self, state: Mapping[str, Tensor]) -> None:
        """Set the caller's buffers to what was saved beside a state."""
        for name, tensor in self.beside.items():
            tensor.copy_(state[name])
