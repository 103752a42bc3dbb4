"""Classes of sizes in which versions of patch_embed are checked and chosen, and the arguments that stand for them.

"p16 large": patches of 16 x 16, enough results for large tiles to occupy the GPU; "p16 small": fewer.
"""

from collections.abc import Iterator

import torch

LARGE_FROM = 2 * 132 * 128 * 128  # elements of the result: two large programs for each of the 132 multiprocessors of an H100 or H200
EVERY = tuple(f"p{patch} {amount}" for patch in (16, 14, 32, 8) for amount in ("large", "small"))
SIZES = {"forward": EVERY, "backward": EVERY}
WIDTH, GRID, ACTIVE = 768, 14, 46  # DeiT-Base at 224 x 224, in patches of 16


def size_class(function: str, *args) -> str:
    if function == "forward":
        images, index, weight, prefix, patch = args[0], args[1], args[2], args[5], args[7]
        elements = len(images) * (index.shape[1] + (0 if prefix is None else len(prefix))) * len(weight)
    else:
        grad, index, weight, patch = args[0], args[1], args[2], args[4]
        elements = len(grad) * index.shape[1] * weight.shape[1]
    return f"p{patch} {'large' if elements >= LARGE_FROM else 'small'}"


def arguments(function: str, size: str, dtype: torch.dtype, device: torch.device | str) -> Iterator[tuple]:
    """Raw arguments of a class: float32 images, rolled and flipped; once more without augmentation, bias, position and prefix."""
    patch, amount = int(size.split()[0][1:]), size.split()[1]
    values, side = 3 * patch**2, GRID * patch

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    for plain in (False, True):
        per_image = ACTIVE * min(WIDTH, values)  # the smaller of both results
        images = -(-LARGE_FROM // per_image) if amount == "large" else 8
        weight = random(WIDTH, values) * values**-0.5
        index = torch.rand(images, GRID**2, device=device).argsort(1)[:, :ACTIVE].to(torch.int64 if plain else torch.int32)
        moved = None if plain else torch.tensor([-13, 22, 1], device=device, dtype=torch.int32)
        prefix = None if plain else random(1, WIDTH)
        if function == "backward":
            grad = random(images, ACTIVE + (not plain), WIDTH)
            yield grad, index, weight, moved, patch, int(not plain), side, side, torch.float32
        else:
            pixels = torch.randn(images, 3, side, side, device=device)
            tables = (None, None) if plain else (random(WIDTH), random(GRID**2, WIDTH))
            yield pixels, index, weight, *tables, prefix, moved, patch
