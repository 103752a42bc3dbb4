"""A few minutes of supervised training, for models that a benchmark needs trained but that come without weights."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smi.images.forward import forward_sparse
from smi.images.patches import to_patches
from smi.random_streams import generator
from smi.teachers.mimetic import initialise_mimetic

BATCH, RATE, DECAY = 64, 1e-3, 0.05
NOISE = 0.5  # largest standard deviation of the noise on the images, as for the digits teacher


def learn(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    kept: tuple[float, float] = (0.25, 1.0),
    noise: float = NOISE,
    peak: float = RATE,
    clip: float = math.inf,
) -> None:
    """Train a newly initialised ViT in place on normalised images [M, C, H, W] and labels int64 [M].

    Its attention weights are initialised mimetically: otherwise a few hundred steps teach it next to nothing. Each step sees shifted, noisy images
    through a random part of their patches, so that it also recognises augmented and synthetic ones.
    kept: smallest and largest fraction of the patches that a step sees; the time of a step grows with it. noise: its largest standard deviation.
    peak: largest learning rate. clip: largest norm of the gradient.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        initialise_mimetic(student)
    optimiser = torch.optim.AdamW(student.parameters(), lr=peak, weight_decay=DECAY)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, steps)
    patch = student.patch_embed.patch_size[0]
    for step in range(steps):
        draw = generator(0, "trunk", step)
        chosen = torch.randperm(len(images), generator=draw)[:BATCH]
        shift = torch.randint(1 - patch, patch, (2,), generator=draw).tolist()
        shown = images[chosen].roll(shift, (2, 3))
        shown = shown + noise * torch.rand(len(chosen), 1, 1, 1, generator=draw) * torch.randn(shown.shape, generator=draw)
        patches = to_patches(shown, patch)
        least, most = (round(share * patches.shape[1]) for share in kept)
        count = int(torch.randint(least, most + 1, (1,), generator=draw))
        index = torch.rand(len(chosen), patches.shape[1], generator=draw).argsort(1)[:, :count]
        loss = F.cross_entropy(forward_sparse(student, (patches[torch.arange(len(chosen))[:, None], index], index)), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimiser.step()
        rate.step()
