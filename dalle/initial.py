"""Random weights at the start: the same for the same seed on any device, in any number of processes."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dalle.zero import whole


def draw_seed() -> int:
    """A seed from torch's generator, which `torch.manual_seed` decides."""
    return int(torch.randint(2**62, (), device="cpu"))


@torch.no_grad()
def draw_weights(spreads: Iterable[tuple[Tensor, float]], seed: int) -> None:
    """Draw each parameter from N(0, spread²), one after another, on the CPU.

    Parameters on the meta device are left alone; of partitioned ones, never more than one is whole. Every
    process draws the same: which one's numbers are kept depends on how the model is partitioned.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter, spread in spreads:
        if parameter.is_meta:
            continue
        with whole([parameter]):
            if spread == 0:
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * spread)
