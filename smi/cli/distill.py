"""What `smi distill` asks for, put together."""

from pathlib import Path

from torch import nn

from ..datasets import load
from ..distillation.loop import Distilled, distill
from ..distillation.pool import Inversion, Source
from ..distillation.students import make_student
from ..errors import InputError
from ..images.sparse_images import SparseImages
from ..models.vit import describe

INVERSION = ("method", "num_images", "iterations", "prune_at", "prune_ratio", "division", "batch_size", "tv_weight", "mean", "std")
TRAINING = {
    "steps": "steps",
    "batch": "batch_size",
    "lr": "lr",
    "temperature": "temperature",
    "head_only": "head_only",
    "patience": "patience",
    "patch_dropout": "patch_dropout",
}


def run_distill(
    teacher: nn.Module,
    folder: Path | None,
    output: Path,
    *,
    student,
    student_checkpoint,
    fresh_blocks,
    preset,
    evaluation,
    refresh_every,
    seed,
    **given,
) -> Distilled:
    """Images from a folder or an inversion, the student by name, real images by name."""
    if folder is not None and refresh_every is not None:
        raise InputError("refreshing makes the images itself: leave out the folder, or --refresh-every")
    force, progress = given.pop("force"), given.pop("progress")
    options = {name: given[option] for option, name in TRAINING.items() if given[option] is not None}
    learner = make_student(student, teacher, checkpoint=student_checkpoint, fresh_blocks=fresh_blocks, seed=seed)
    real = None if evaluation is None else load(evaluation, _reading(learner, teacher))
    images: Source
    if folder is None:
        settings = {name: given[name] for name in INVERSION if given[name] is not None}
        images = Inversion(teacher, seed=seed, progress=progress, **settings)
    else:
        images = SparseImages.load(folder)
    return distill(
        teacher,
        learner,
        images,
        preset=preset,
        evaluation=real,
        output=output,
        force=force,
        progress=progress,
        refresh_every=refresh_every,
        seed=seed,
        **options,
    )


def _reading(student: nn.Module, teacher: nn.Module):
    """Whose channels, size and statistics real images get: the student's own where it is a supported ViT, else the teacher's."""
    try:
        return describe(student)
    except InputError:
        return describe(teacher)
