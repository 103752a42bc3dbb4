"""The images of a distillation: made once, or a pool that a running inversion refreshes every k steps."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..images.sparse_images import SparseImages
from ..inversion.loop import invert
from ..plain import for_json, scalar, whole
from ..random_streams import generator

POOL = re.compile(r"pool-[0-9]{6,}")  # folders of saved rounds
Source = SparseImages | Callable[[int], SparseImages] | Iterator[SparseImages]


class Pool:
    """The images in use. With a folder, those of a refreshed pool are saved there, so that a killed run need not make them again."""

    def __init__(self, source: Source, refresh_every: int | None, holdout: float, seed: int, folder: Path | None) -> None:
        if isinstance(source, SparseImages) and refresh_every is not None:
            raise InputError("refreshing needs a source of new images: a function of the round, or an iterator such as smi.invert_batches gives")
        if not isinstance(source, SparseImages) and not callable(source) and not hasattr(source, "__next__"):
            raise InputError(f"images must be SparseImages, a function of the round, or an iterator of SparseImages, got {type(source).__name__}")
        self.source, self.refresh_every, self.folder = source, refresh_every, folder
        self.round, self.drawn = -1, 0
        first = self._make(0)
        self.held_out, self.images = _split(first, holdout, seed)
        self.round = 0

    def at(self, step: int) -> SparseImages:
        """The images of a step."""
        wanted = step // self.refresh_every if self.refresh_every else 0
        if wanted != self.round:
            self.images = self._make(wanted)
            self.round = wanted
        return self.images

    def forget(self) -> None:
        """Remove saved images of earlier rounds; the first stays, it holds what is held out."""
        if self.folder is not None:
            remove_pools(self.folder, (self._name(0), self._name(self.round)))

    @staticmethod
    def _name(number: int) -> str:
        return f"pool-{number:06d}"

    def _make(self, number: int) -> SparseImages:
        if isinstance(self.source, SparseImages):
            return _checked(self.source)
        folder = None if self.folder is None else self.folder / self._name(number)
        if folder is not None and folder.exists():
            try:
                kept = SparseImages.load(folder)
                if kept.provenance.pop("complete"):
                    return kept
            except InputError:
                pass  # half written when the run was killed: made again
            shutil.rmtree(folder)
        images = _checked(self._drawn(self.source, number))
        if folder is not None:
            replace(images, provenance={**images.provenance, "complete": True}).save(folder)
        return images

    def _drawn(self, source: Callable[[int], SparseImages] | Iterator[SparseImages], number: int) -> SparseImages:
        if callable(source):
            return source(number)
        for images in source:  # an iterator starts from its beginning when a run is resumed
            self.drawn += 1
            if self.drawn > number:
                return images
        raise InputError(f"the source of images ended after {self.drawn} batches, {number + 1} are needed: make more, or refresh less often")

    def digest(self) -> str:
        """What identifies the images of the first round."""
        digest = hashlib.sha256()
        for part in (self.held_out, self.images):
            for tensor in () if part is None else (part.patches, part.index):
                digest.update(_bytes(tensor))
        return digest.hexdigest()


class Inversion:
    """A source of images: round k inverts the model with seed + k and these settings of `smi.invert`."""

    def __init__(self, model: nn.Module, *, seed: int = 0, **settings: Any) -> None:
        self.model, self.seed, self.settings = model, whole()("seed", seed), settings
        told = {name: value for name, value in settings.items() if isinstance(scalar(value), str | int | float | list | np.ndarray | Tensor)}
        self.about = {"seed": self.seed, **{name: for_json(value) for name, value in told.items()}}

    def __call__(self, number: int) -> SparseImages:
        return invert(self.model, seed=self.seed + number, **self.settings)


def remove_pools(folder: Path, but: Sequence[str] = ()) -> None:
    """Remove the saved rounds in a folder."""
    for path in folder.iterdir():
        if POOL.fullmatch(path.name) and path.name not in but and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _bytes(tensor: Tensor) -> bytes:
    return str(tuple(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes()


def _checked(images: SparseImages) -> SparseImages:
    if not isinstance(images, SparseImages):
        raise InputError(f"the source of images must give SparseImages, got {type(images).__name__}")
    if not len(images):
        raise InputError("there are no images to learn from")
    return images


def _split(images: SparseImages, holdout: float, seed: int) -> tuple[SparseImages | None, SparseImages]:
    """Images held out and images left, chosen from the seed; None where the fraction is not one whole image."""
    count = int(holdout * len(images))
    order = torch.randperm(len(images), generator=generator(seed, "holdout")).to(images.labels.device)
    return (images[order[:count].sort().values] if count else None), images[order[count:].sort().values]
