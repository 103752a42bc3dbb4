"""Without a GPU, Triton kernels run in Triton's interpreter: the switch must be set before anything (timm, for one) imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
