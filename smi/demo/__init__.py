"""The main job on the embedded teacher: every method, the same number of images, what they are worth, one report."""

from .compare import ITERATIONS, METHODS, NUM_IMAGES, Row, compare
from .downstream import TRANSFER_STEPS
from .run import demo

__all__ = ["ITERATIONS", "METHODS", "NUM_IMAGES", "TRANSFER_STEPS", "Row", "compare", "demo"]
