"""What synthesised images are worth before they are used: does the teacher recognise them, stage by stage, and does another model?

Agreement is the fraction of images that a model assigns to the label they were made for, confidence the probability it gives that label.
"""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .images.patches import from_patches
from .images.readers import Reader, logits, make_reader
from .images.sparse_images import SparseImages, check_labels
from .models.unwrap import holds_vit, peel
from .models.vit import describe_weights
from .plain import dense, usable_device, whole
from .random_streams import generator
from .surroundings import at_the_door, evaluating

COMPARED = 200  # images set against real ones at most: every one is compared with all of its class


@dataclass(frozen=True)
class Recognition:
    """How one model reads some images."""

    images: int
    agreement: float
    confidence: float
    cross_entropy: float


@dataclass(frozen=True)
class Verdict:
    """How another model reads the images that a teacher made."""

    recognition: Recognition
    same_answer: float  # fraction of the images on which it names the class that the teacher names
    reads: str  # "retained patches" or "filled images"


@dataclass(frozen=True)
class Likeness:
    """Synthetic images beside the real one of their class that is nearest in the retained pixels."""

    images: int
    psnr: float  # dB, mean over images, retained pixels alone
    ssim: float | None  # mean; None for sparse images: its windows would lie across missing patches


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` finds."""

    teacher: Recognition
    stages: list[Recognition]  # in the order in which the patches left: PRI's re-birth curve
    random: Recognition | None  # as many patches drawn at random from all that a trajectory emitted, None where there is one stage
    verifier: Verdict | None
    likeness: Likeness | None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@at_the_door
def evaluate(
    images: SparseImages,
    model: nn.Module,
    *,
    verifier: nn.Module | None = None,
    real: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Evaluation:
    """Judge images by the model they were made from, by a different one, and against real images.

    verifier: any model of the same classes; one on the same patch grid reads the retained patches, any other the filled images (with a warning).
    real: images [N, C, H, W], normalised as the synthetic ones, and labels [N]. seed: of the random patches. device: None: the model's.
    Raises InputError where a model or the real images do not fit the images.
    """
    seed = whole()("seed", seed)
    if not isinstance(images, SparseImages) or not isinstance(model, nn.Module):
        raise InputError(f"images must be SparseImages, of a model, got {type(images).__name__} and {type(model).__name__}")
    device = _device_of(model) if device is None else usable_device(device)
    if real is not None and not (isinstance(real, tuple | list) and len(real) == 2 and all(isinstance(part, Tensor) for part in real)):
        raise InputError(f"real must be images [N, C, H, W] and labels [N], two tensors, got {type(real).__name__}")
    if verifier is not None and not isinstance(verifier, nn.Module):
        raise InputError(f"verifier must be a model, got {type(verifier).__name__}")
    if holds_vit(model) and images.sparsity > 0:  # a whole image it reads by its own modules
        describe_weights(model)  # what the images were made from is supported, or it is another model
    answers, _ = _answers(model, images, device, "the model")
    shuffled = None if _stages(images) == 1 else random_parts(images, seed)
    return Evaluation(
        teacher=recognition(answers, images.labels),
        stages=[recognition(answers[images.stage.cpu() == stage], images.labels[images.stage == stage]) for stage in range(_stages(images))],
        random=None if shuffled is None else recognition(_answers(model, shuffled, device, "the model")[0], shuffled.labels),
        verifier=None if verifier is None else _verdict(verifier, images, answers, device),
        likeness=None if real is None else likeness(images, *real),
    )


def recognition(answers: Tensor, labels: Tensor) -> Recognition:
    """Agreement and confidence of logits [M, classes] with labels [M]."""
    from torchmetrics.functional.classification import multiclass_accuracy

    labels = labels.cpu()
    if not len(labels):
        return Recognition(0, 0.0, 0.0, 0.0)
    log_probability = answers.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    agreement = multiclass_accuracy(answers, labels, num_classes=answers.shape[1], average="micro").item()
    return Recognition(len(labels), agreement, log_probability.exp().mean().item(), -log_probability.mean().item())


def random_parts(images: SparseImages, seed: int = 0) -> SparseImages:
    """The control of the re-birth curve: images of as many patches, drawn from all that their trajectory emitted, whatever the stage.

    Only trajectories of which every stage is there take part; one image for each of theirs. The drawn parts of a trajectory are disjoint, too.
    """
    stages, n = _stages(images), images.index.shape[1]
    numbers, counts = images.trajectory.unique(return_counts=True)
    whole = numbers[counts == stages]
    if not len(whole):
        raise InputError("no trajectory has all its stages: the stages cannot be compared with random patches")
    chosen = images[torch.isin(images.trajectory, whole)]
    order = torch.argsort(chosen.trajectory * stages + chosen.stage)
    chosen = chosen[order]
    patches = chosen.patches.unflatten(0, (-1, stages)).flatten(1, 2)  # [trajectories, stages * n, C, p, p]
    index = chosen.index.unflatten(0, (-1, stages)).flatten(1, 2)
    places = torch.stack([torch.randperm(stages * n, generator=generator(seed, "random parts", int(number))) for number in whole])
    rows = torch.arange(len(whole))[:, None]
    patches, index = patches[rows, places].unflatten(1, (stages, n)).flatten(0, 1), index[rows, places].unflatten(1, (stages, n)).flatten(0, 1)
    order = index.argsort(1)
    patches = patches[torch.arange(len(patches))[:, None], order]
    return SparseImages(patches, index.gather(1, order), chosen.labels, chosen.trajectory, chosen.stage, chosen.grid, chosen.mean, chosen.std)


def likeness(images: SparseImages, real: Tensor, labels: Tensor, most: int = COMPARED) -> Likeness:
    """PSNR, and for dense images SSIM, against the real image [N, C, H, W] of the same class that is nearest in the retained pixels."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    real, labels = dense("the real images", real), dense("the real images' labels", labels)
    if real.shape[:1] != labels.shape or not labels.numel():
        raise InputError(f"real images need as many labels, at least one, got images {list(real.shape)} and labels {list(labels.shape)}")
    wanted = (images.patches.shape[2], *images.image_size)
    if tuple(real.shape[1:]) != wanted:
        raise InputError(f"real images must be {list(wanted)} like the synthetic ones, got {list(real.shape[1:])}")
    check_labels("the real images' labels", labels)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (images.mean, images.std))
    theirs, judged = (real.cpu().float() * std + mean).clamp(0, 1), images[:: max(1, -(-len(images) // most))].to("cpu")
    mine, masks = judged.to_pixels(), _retained(judged)
    signal, structure = [], []
    for pixels, mask, label in zip(mine, masks, judged.labels.tolist(), strict=True):
        same = theirs[labels.cpu() == label]
        if len(same):
            nearest = same[((same - pixels) ** 2)[..., mask].flatten(1).mean(1).argmin()]
            signal.append(peak_signal_noise_ratio(pixels[:, mask], nearest[:, mask], data_range=1.0).item())
            if images.sparsity == 0:
                similarity: Any = structural_similarity_index_measure(pixels[None], nearest[None], data_range=1.0)
                structure.append(similarity.item())
    if not signal:
        raise InputError("the real images hold none of the classes of the synthetic ones")
    return Likeness(len(signal), sum(signal) / len(signal), sum(structure) / len(structure) if structure else None)


def _retained(images: SparseImages) -> Tensor:
    """bool [M, H, W]: pixels of retained patches."""
    ones = torch.ones(*images.index.shape, 1, images.patch_size, images.patch_size)
    return from_patches(ones, images.index, images.grid, torch.zeros(1))[:, 0] > 0


def _stages(images: SparseImages) -> int:
    if not len(images):
        raise InputError("there are no images to judge")
    return int(images.stage.max()) + 1


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _answers(model: nn.Module, images: SparseImages, device: torch.device, role: str) -> tuple[Tensor, Reader]:
    if any(tensor.device != device for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(peel(model)).to(device)  # the user's own stays where it is
    with evaluating(model):
        read = make_reader(model, images, role)
        if int(images.labels.max()) >= read.num_classes:
            raise InputError(f"the images have labels up to {int(images.labels.max())}, but {role} has {read.num_classes} classes")
        return logits(read, images, device), read


def _verdict(verifier: nn.Module, images: SparseImages, teacher: Tensor, device: torch.device) -> Verdict:
    answers, read = _answers(verifier, images, device, "the verifier")
    if answers.shape[1] != teacher.shape[1]:
        raise InputError(f"the verifier has {answers.shape[1]} classes, the model {teacher.shape[1]}: they must be the same")
    same = (answers.argmax(1) == teacher.argmax(1)).double().mean().item()
    return Verdict(recognition(answers, images.labels), same, "retained patches" if read.sparse else "filled images")
