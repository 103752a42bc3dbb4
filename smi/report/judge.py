"""The model that the images came from, where it can be had, and what it says of them."""

import warnings
from pathlib import Path

from torch import nn

from ..errors import InputError
from ..evaluate import Evaluation, evaluate
from ..images.sparse_images import SparseImages
from ..models.by_name import EMBEDDED, load_model
from ..models.levels import read_model


class Judge:
    """Reads images by the model of their provenance, or by `model` (a name as of `load_model`) with the weights of `checkpoint`.

    Only the embedded teacher is loaded unasked: nothing is fetched from a hub because of a report.
    """

    def __init__(self, model: str | None = None, checkpoint: Path | None = None):
        self.model, self.checkpoint = model, checkpoint
        self.loaded: dict[tuple, nn.Module] = {}

    def __call__(self, images: SparseImages) -> tuple[Evaluation | None, str]:
        """What the model says, None where it cannot be asked; and a sentence about who was asked, or why nobody. Raises InputError or RunError where
        the model that was named cannot be loaded."""
        model = self._model(images)
        if model is None:
            return None, _whom_to_ask(images.provenance.get("model"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a model on another grid: it was named by the user
                found = evaluate(images, model)
        except InputError as error:
            return None, f"The images were not judged: {error}."
        return found, self._about(model, images)

    def _model(self, images: SparseImages) -> nn.Module | None:
        name = self.model or images.provenance.get("model")
        if not isinstance(name, str) or (self.model is None and self.checkpoint is None and name != EMBEDDED):
            return None
        whole = name == EMBEDDED or Path(name).is_dir()  # comes with its weights and size
        key = name, None if whole else images.image_size
        if key not in self.loaded:
            self.loaded[key] = load_model(name, checkpoint=self.checkpoint, image_size=key[1])
        return self.loaded[key]

    @staticmethod
    def _about(model: nn.Module, images: SparseImages) -> str:
        wanted = images.provenance.get("weights_sha256")
        try:
            vit, _ = read_model(model, mean=images.mean, std=images.std, image_size=images.image_size)
        except InputError:
            return "Judged by another model than the one that the images came from."
        if wanted is None:
            return f"Judged by {vit.name}."
        if vit.weight_hash() == wanted:
            return f"Judged by {vit.name}, the model that the images came from."
        return f"Judged by {vit.name} with other weights than the images came from."


def _whom_to_ask(name: str | None) -> str:
    if name is None:
        return "The images were not judged: they do not say which model they came from. Pass --model (and --checkpoint) to name one."
    return f"The images were not judged: pass --model {name} --checkpoint FILE with the weights that were inverted."
