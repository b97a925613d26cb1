"""The prior's cross-entropy: an eighth for the text, the rest for the picture."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stage2_prior.model import Prior


def losses(
    model: Prior, tokens: Int[Tensor, "b words"], codes: Int[Tensor, "b cells"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Text and image cross-entropy in nats per token, each a mean over the tokens of its kind.

    Slots without a text token are no targets; each kind has its own head, computed only where it is
    needed. Source: paper, §2.2.
    """
    text, image = model(tokens, codes)
    real = tokens >= 0
    words = model.logits(model.text_head, text[:, :-1][real])
    text_loss = F.cross_entropy(words, tokens[real], reduction="sum") / real.sum().clamp_min(1)
    cells = model.logits(model.image_head, image)
    return text_loss, F.cross_entropy(cells.flatten(0, 1), codes.flatten())
