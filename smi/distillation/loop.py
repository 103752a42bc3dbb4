"""Knowledge transfer: a student learns a teacher's answers to sparse images.

loss = T^2 KL(softmax(teacher / T) || softmax(student / T)),  both reading the retained patches alone
"""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, RunError
from ..images.readers import Reader, logits, make_reader
from ..images.sparse_images import check_labels
from ..models.folder import load_weights
from ..models.levels import Model, read_model
from ..models.module import Classifier
from ..models.unwrap import peel
from ..models.vit import describe_weights
from ..plain import dense, usable_device
from ..random_streams import generator
from ..surroundings import at_the_door, seeded
from . import augment
from .pool import Pool, Source
from .progress import TrainingProgress
from .run_folder import STATE, open_folder, read_result, write_curve, write_result
from .settings import Settings, freeze_trunk, make_optimiser, make_settings
from .training_state import load_state, save_state

SAVE_EVERY = 30.0  # seconds


@dataclass(frozen=True, eq=False)
class Distilled:
    """What a distillation gives."""

    student: nn.Module  # a copy with the best weights, in evaluation mode
    curve: list[dict]  # one row an evaluation: step, seconds since the start (of all sittings), loss, kl, agreement, accuracy
    best: dict  # the row of those weights
    steps: int  # taken
    stopped_early: bool
    accuracy: float | None  # of the returned student on the evaluation data
    settings: dict

    def record(self) -> dict:
        """Everything but the student, as JSON."""
        return {name: getattr(self, name) for name in ("best", "steps", "stopped_early", "accuracy", "settings", "curve")}


@at_the_door
def distill(
    teacher: nn.Module,
    student: nn.Module,
    images: Source,
    *,
    preset: str = "published",
    evaluation: tuple[Tensor, Tensor] | None = None,
    output: str | Path | None = None,
    force: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
    **options: Any,
) -> Distilled:
    """Train a copy of `student` to answer sparse images as `teacher` does.

    images: SparseImages; or, to refresh them every `refresh_every` steps, a function that makes those of round 0, 1, ..., or an iterator such as
    `smi.invert_batches` gives. A student on the teacher's patch grid reads the retained patches alone, any other the filled image (with a warning).
    preset: "published" (SGD 0.1, momentum 0.9, weight decay 1e-4, constant rate) or "adamw".
    options: fields of `smi.distillation.settings.Settings` that replace the preset's, such as steps, batch_size, lr, temperature, head_only, seed.
    evaluation: real images [N, C, H, W], normalised for the student, and labels [N]; the accuracy on them is reported.
    output: a folder for learning curve, best student and state of the run; a killed run goes on when called again with the same arguments.
    device: None: the student's. on_step: called with step and loss.

    The best weights are those of the smallest divergence on held-out images (on all images where `holdout` is less than one image): real data takes
    no part in the choice. Raises InputError for what cannot be done, RunError where the loss is no longer finite or writing fails.
    """
    settings = make_settings(preset, options)
    run = _Distillation(teacher, student, images, settings, evaluation, output, force, device)
    return run.finished() or run.train(progress, on_step)


class _Distillation:
    """A distillation under way: checked when made."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        images: Source,
        settings: Settings,
        evaluation: tuple[Tensor, Tensor] | None,
        output: str | Path | None,
        force: bool,
        device: str | torch.device | None,
    ):
        self.settings, self.evaluation = settings, evaluation
        self.device = usable_device(device) if device is not None else next(student.parameters()).device
        self.folder = None if output is None else open_folder(Path(output), force)
        self.pool = Pool(images, settings.refresh_every, settings.holdout, settings.seed, self.folder)
        student = peel(student)
        self.student = copy.deepcopy(student).to(self.device)
        self.teacher = copy.deepcopy(peel(teacher)).to(self.device).eval()
        self.read_teacher = make_reader(self.teacher, self.pool.images, "the teacher", frozen=True)
        self.read_student = make_reader(self.student, self.pool.images, "the student")
        about = self.pool.images
        vit, _ = read_model(self.teacher, mean=about.mean, std=about.std, image_size=about.image_size)
        self._check_models(vit)
        self._check_evaluation()
        if settings.head_only:
            freeze_trunk(self.student)
        for parameter in self.teacher.parameters():
            parameter.requires_grad_(False)
        self.optimiser = make_optimiser(self.student, settings)
        self.roll = min(vit.image_size) // 8 if settings.roll is None else settings.roll
        self.flip = vit.flip if settings.flip is None else settings.flip
        self.patch_dropout = settings.patch_dropout if self.read_teacher.sparse and self.read_student.sparse else 0.0
        self.asked = {
            "settings": asdict(settings),
            "teacher": vit.weight_hash(),
            "student": _weight_hash(student),
            "images": self.pool.digest(),
            "source": getattr(images, "about", None),
            "evaluation": None if evaluation is None else len(evaluation[1]),
        }
        self.step, self.seconds, self.worse = 0, 0.0, 0
        self.curve: list[dict] = []
        self.best: Any = None  # a row of the curve, once there is one
        self.best_weights: dict[str, Tensor] = {}

    def _check_models(self, vit: Model) -> None:
        """Raise InputError where images, teacher and student do not fit one another."""
        teacher, student = self.read_teacher, self.read_student
        if not teacher.sparse and isinstance(vit, Classifier) and self.pool.images.sparsity > 0:
            describe_weights(self.teacher)  # says why it reads whole images alone
        if not teacher.sparse and not isinstance(vit, Classifier):
            raise InputError("the teacher must be a ViT on the grid of the images: these were made for another model")
        if teacher.num_classes != student.num_classes:
            raise InputError(f"the student has {student.num_classes} classes, the teacher {teacher.num_classes}: they must be the same")
        most = max(int(part.labels.max()) for part in (self.pool.images, self.pool.held_out) if part is not None)
        if most >= teacher.num_classes:
            raise InputError(f"the images have labels up to {most}, but the teacher has {teacher.num_classes} classes: another model's")

    def _check_evaluation(self) -> None:
        """Raise InputError where the real images do not fit the student."""
        if self.evaluation is None:
            return
        if not (isinstance(self.evaluation, tuple | list) and [isinstance(part, Tensor) for part in self.evaluation] == [True, True]):
            raise InputError(f"evaluation must be images [N, C, H, W] and labels [N], both tensors, got {type(self.evaluation).__name__}")
        images, labels = (dense(name, part) for name, part in zip(("evaluation images", "evaluation labels"), self.evaluation, strict=True))
        if images.shape[:1] != labels.shape or not labels.numel():
            given = f"got images {list(images.shape)} and labels {list(labels.shape)}"
            raise InputError(f"evaluation needs as many labels as images, at least one of each, {given}")
        check_labels("evaluation labels", labels, self.read_student.num_classes)
        try:
            self._accuracy(self.evaluation, limit=1)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise InputError(f"the student cannot take the evaluation images {list(images.shape[1:])}: {str(error).splitlines()[0]}") from error

    def finished(self) -> Distilled | None:
        """The result of an earlier run with the same arguments that came to its end."""
        ended = None if self.folder is None else read_result(self.folder)
        if self.folder is None or ended is None:
            return None
        student = copy.deepcopy(self.student)
        try:
            self._refuse_other_run(ended["asked"])
            student.load_state_dict(load_weights(self.folder))
            return Distilled(student.eval(), **ended["result"])
        except (TypeError, KeyError, AttributeError, RuntimeError) as error:  # a part that is missing or of another kind
            raise InputError(f"the distillation in {self.folder} is damaged ({error}): choose another folder, or start over with --force") from error

    def _refuse_other_run(self, asked: dict) -> None:
        """Raise InputError where the folder is of a run with other arguments."""
        if asked != json.loads(json.dumps(self.asked)):
            different = ", ".join(name for name in self.asked if asked.get(name) != json.loads(json.dumps(self.asked[name])))
            raise InputError(f"{self.folder} holds a run with other {different}: choose another folder, or pass --force (force=True) to start over")

    def train(self, progress: bool, on_step: Callable[[int, float], None] | None) -> Distilled:
        """Take all steps, or those that are left."""
        self._resume()
        saved = time.monotonic()
        began = saved - self.seconds
        stopped = self._out_of_patience()
        with TrainingProgress("distill", self.settings.steps, self.step, shown=progress) as show:
            while self.step < self.settings.steps and not stopped:
                loss = self._update()
                self.step, self.seconds = self.step + 1, time.monotonic() - began
                show(self.step, f"loss {loss:.4f}" + (f"  held out kl {self.curve[-1]['kl']:.4f}" if self.curve else ""))
                if on_step is not None:
                    on_step(self.step, loss)
                due = self.step % self.settings.eval_every == 0 or self.step == self.settings.steps
                if due:
                    self._evaluate(loss)
                    stopped = self._out_of_patience()
                if due or time.monotonic() - saved >= SAVE_EVERY:
                    self._save()
                    saved = time.monotonic()
        return self._finish(stopped)

    def _update(self) -> float:
        """Take one step; returns its loss."""
        settings, images = self.settings, self.pool.at(self.step)
        draw = generator(settings.seed, "distill", self.step)
        chosen = torch.randperm(len(images), generator=draw)[: settings.batch_size]
        offsets, flips = augment.draw(len(chosen), self.roll, self.flip, draw)
        patches, index = augment.roll_and_flip(images.patches[chosen].float(), images.index[chosen], images.grid, offsets, flips)
        if self.patch_dropout:
            patches, index = augment.drop_patches(patches, index, self.patch_dropout, draw)
        patches, index = patches.to(self.device), index.to(self.device)
        self.student.train()
        with seeded(draw.initial_seed(), self.device):  # dropout of students that have any
            loss = divergence(self.read_student(patches, index), _targets(self.read_teacher, patches, index), settings.temperature)
        for group in self.optimiser.param_groups:
            group["lr"] = settings.rate(self.step)
        self.optimiser.zero_grad()
        loss.backward()
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), settings.clip)
        self.optimiser.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RunError(f"the loss is {value} at step {self.step}: lower the learning rate (lr), or take the preset adamw")
        return value

    def _evaluate(self, loss: float) -> None:
        """Add a row to the learning curve, and remember the weights where they are the best so far."""
        self.student.eval()
        judged = self.pool.held_out if self.pool.held_out is not None else self.pool.images
        mine, wanted = (logits(read, judged, self.device) for read in (self.read_student, self.read_teacher))
        row = {
            "step": self.step,
            "seconds": self.seconds,
            "loss": loss,
            "kl": float(divergence(mine, wanted, self.settings.temperature)),
            "agreement": (mine.argmax(1) == wanted.argmax(1)).double().mean().item(),
            "accuracy": None if self.evaluation is None else self._accuracy(self.evaluation),
        }
        self.curve.append(row)
        if self.best is None or row["kl"] < self.best["kl"]:
            self.best, self.worse = row, 0
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self.student.state_dict().items()}
        else:
            self.worse += 1

    def _out_of_patience(self) -> bool:
        return self.settings.patience is not None and self.worse >= self.settings.patience

    @torch.no_grad()
    def _accuracy(self, evaluation: tuple[Tensor, Tensor], limit: int | None = None) -> float:
        """Fraction of the real images, all patches seen, that the student recognises with its present weights."""
        images, labels = (tensor[:limit] for tensor in evaluation)
        self.student.eval()
        right = 0
        for some, wanted in zip(images.split(256), labels.split(256), strict=True):
            right += int((self.student(some.to(self.device)).argmax(1).cpu() == wanted.cpu()).sum())
        return right / len(labels)

    def _resume(self) -> None:
        if self.folder is None or not (self.folder / STATE).exists():
            return
        progress, extra = load_state(self.folder / STATE, self.student, self.optimiser)
        self._refuse_other_run(progress["asked"])
        self.step, self.seconds, self.curve, self.best, self.worse = (progress[name] for name in ("step", "seconds", "curve", "best", "worse"))
        self.best_weights = {name: tensor.to(self.device) for name, tensor in extra.items()}

    def _save(self) -> None:
        if self.folder is None:
            return
        progress = {name: getattr(self, name) for name in ("asked", "step", "seconds", "curve", "best", "worse")}
        save_state(self.folder / STATE, self.student, self.optimiser, progress, self.best_weights)
        write_curve(self.folder, self.curve)
        self.pool.forget()

    def _finish(self, stopped: bool) -> Distilled:
        self.student.load_state_dict(self.best_weights)
        result = Distilled(self.student.eval(), self.curve, self.best, self.step, stopped, self.best["accuracy"], asdict(self.settings))
        if self.folder is not None:
            write_result(self.folder, self.student, self.asked, result.record())
        return result


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [B, classes], mean over the batch; T^2 keeps the gradient's size at any T."""
    targets = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(F.log_softmax(student / temperature, dim=1), targets, log_target=True, reduction="batchmean")


@torch.no_grad()
def _targets(read: Reader, patches: Tensor, index: Tensor) -> Tensor:
    return read(patches, index)


def _weight_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
