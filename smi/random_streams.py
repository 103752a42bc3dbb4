"""Everything random is drawn from one seed, by a stream of its own for each purpose."""

import numpy as np
import torch


def generator(seed: int, purpose: str, trajectory: int = 0) -> torch.Generator:
    """An independent stream of random numbers on the CPU for each purpose and trajectory, whatever the batch size."""
    words = np.random.SeedSequence([seed, *purpose.encode(), trajectory]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
