"""A start from which a small codebook is in use at once."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stage1_dvae.likelihood import map_pixels
from stage1_dvae.model import DVAE, Output


@torch.no_grad()
def spread_logits(model: DVAE, pixels: Float[Tensor, "b 3 h w"], std: float) -> None:
    """Rescale the encoder's last layer so that each code's logit has mean 0 and this spread over `pixels`.

    As released, logits start with a spread of 0.4, far below the Gumbel noise's: every code says the
    same, and in a short run most of them never recover. Spread out, unlike cells choose unlike codes
    from the first update.
    """
    *layers, output = model.encoder.blocks
    assert isinstance(output, Output)
    features = map_pixels(pixels)
    for layer in layers:
        features = layer(features)
    logits = F.conv2d(F.relu(features), output.conv.w).movedim(1, -1).flatten(0, 2)
    factor = std / logits.std(0).clamp_min(1e-6)
    output.conv.w.mul_(factor[:, None, None, None])
    output.conv.b.copy_(-logits.mean(0) * factor)
