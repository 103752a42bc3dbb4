"""Knowledge transfer: a student is distilled from a teacher by synthesised images."""

from .loop import Distilled, distill
from .pool import Inversion
from .settings import PRESETS
from .students import make_student, partly_fresh, small_student

__all__ = ["PRESETS", "Distilled", "Inversion", "distill", "make_student", "partly_fresh", "small_student"]
