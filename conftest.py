"""Without a GPU, Triton kernels run in Triton's interpreter: the switch must be set before anything (timm, for one) imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import bench  # noqa: E402, F401  makes smi.kernels importable where the package is not installed (GPU machines)
