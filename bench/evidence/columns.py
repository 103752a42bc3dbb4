"""Rows and columns of the evidence, as data: what is made, and what is found out of it."""

from smi.inversion.methods import JUDGED
from smi.quantization.recipe import LINEAR_INPUTS, PUBLISHED, REPARAMETRIZED

ROWS = {method.key: method for method in JUDGED}
LONGEST_FIRST = ("psaq", "dense", "real", "gaussian", "pri2", "smi", "pri4", "pri7")
WIDTHS = ((8, 8), (4, 8), (6, 6), (4, 4), (4, 3))  # bits of weights and activations
QUANTISED = {f"w{weights}a{activations}": (LINEAR_INPUTS, weights, activations) for weights, activations in WIDTHS}  # columns, and how
PUBLISHED_QUANTISED = {f"published_{name}": (PUBLISHED, *bits) for name, (_, *bits) in QUANTISED.items()}
FEW_BITS = {f"reparametrized_{name}": (REPARAMETRIZED, *bits) for name, (_, *bits) in QUANTISED.items() if bits[1] < 8}
HOW = {**QUANTISED, **PUBLISHED_QUANTISED, **FEW_BITS}
STUDENTS = ("copy", "small", "trunk")
DEFAULT_COLUMNS = ("agreement", "full", "w8a8", "w4a8", "w4a4", "w4a3", *STUDENTS)
IMAGENET_COLUMNS = ("agreement", "full", *list(PUBLISHED_QUANTISED)[:4], *list(QUANTISED)[:4], *list(FEW_BITS)[:2])
JUDGED_COLUMNS = ("agreement", "full", *HOW, *STUDENTS)
COLUMNS = ("seconds", "gflops", "flops_ratio", *JUDGED_COLUMNS)
HEADINGS = {
    **{name: f"W{weights}/A{activations}{'' if recipe == LINEAR_INPUTS else f', {recipe}'}" for name, (recipe, weights, activations) in HOW.items()},
    "seconds": "core-seconds",
    "speedup": "speed-up",
    "gflops": "GFLOP/image",
    "flops_ratio": "of model",
    "agreement": "agreement",
    "full": "float32",
    "copy": "copy",
    "small": "small",
    "trunk": "trunk",
}
UNITS = {"seconds": (1.0, 1), "speedup": (1.0, 2), "gflops": (1.0, 2), "flops_ratio": (1.0, 3)}  # factor and decimals; per cent for the others
