"""Rows and columns of the evidence, as data: what is made, and what is found out of it."""

from smi.inversion.methods import JUDGED

ROWS = {method.key: method for method in JUDGED}
LONGEST_FIRST = ("psaq", "dense", "real", "gaussian", "pri2", "smi", "pri4", "pri7")
WIDTHS = ((8, 8), (4, 8), (4, 4), (4, 3))  # bits of weights and activations: the published ones, then where the rows differ
QUANTISED = tuple(f"w{weights}a{activations}" for weights, activations in WIDTHS)
STUDENTS = ("copy", "small", "trunk")
JUDGED_COLUMNS = ("agreement", "full", *QUANTISED, *STUDENTS)
COLUMNS = ("seconds", "gflops", "flops_ratio", *JUDGED_COLUMNS)
HEADINGS = {
    **{name: name.upper().replace("A", "/A") for name in QUANTISED},
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
