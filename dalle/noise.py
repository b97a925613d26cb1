"""Generators of noise that are a function of their key alone.

All noise of training is drawn from generators keyed by (seed, position of the sample). So a resumed run
repeats the uninterrupted one without any random state in the checkpoint, in any number of processes.
"""

from typing import TypeAlias

import numpy as np
import torch

Noise: TypeAlias = torch.Generator | np.random.Generator


def keyed(device: torch.device, *key: int) -> torch.Generator:
    """Of torch's own."""
    seed = 0
    for number in key:
        seed = (seed * 1_000_003 + number) & 0x7FFF_FFFF_FFFF_FFFF
    return torch.Generator(device).manual_seed(seed)


def noise_of(device: torch.device, *key: int) -> Noise:
    """Of the kind that is fastest for much noise: on CPUs numpy's, which takes half as long."""
    if device.type == "cuda":
        return keyed(device, *key)
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))
