"""Classes of sizes in which versions of image_step are checked and chosen, and the arguments that stand for them.

"p16": the active patches of 16 x 16; "all": whole images.
"""

from collections.abc import Iterator

import torch

from . import reference

PATCHES = ("p16", "p14", "p32", "p8")
SIZES = {"forward": ("p16", "all", *PATCHES[1:]), "tv_norms": ("all",), "tv_norms_backward": ("all",)}
DTYPES = (torch.float32,)  # of pixels in the engine; what `verify` checks
WRITTEN = {"forward": (0, 2, 3)}  # images and moments, in place


def size_class(function: str, *args) -> str:
    return "all" if function != "forward" or args[7] is None else f"p{args[8]}"


def arguments(function: str, size: str, dtype: torch.dtype, device: torch.device | str) -> Iterator[tuple]:
    """Raw arguments of a class: 128 images of 14 x 14 patches, 46 of them active, with total variation; three images without."""
    patch = 16 if size == "all" else int(size[1:])
    for batch, tv_weight in ((128, 1e-4), (3, 0.0)):
        images, grad, exp_avg = torch.randn(3, batch, 3, 14 * patch, 14 * patch, device=device, dtype=dtype).unbind()
        norms = reference.tv_norms(images)
        if function == "tv_norms":
            yield (images,)
        elif function == "tv_norms_backward":
            yield images, norms, torch.randn_like(norms)
        else:
            low, high = torch.full((3,), -2.0, device=device), torch.full((3,), 2.0, device=device)
            count = torch.tensor(100, device=device, dtype=torch.int32)
            index = None if size == "all" else torch.rand(batch, 196, device=device).argsort(1)[:, :46].int()
            yield images, grad, exp_avg, grad.square(), count, low, high, index, patch, norms, tv_weight, 0.25, 0.5, 0.99, 1e-8, None
