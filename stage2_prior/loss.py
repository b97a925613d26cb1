"""The prior's cross-entropy: an eighth for the text, the rest for the picture."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stage2_prior.model import Prior


def losses(
    model: Prior, tokens: Int[Tensor, "b words"], codes: Int[Tensor, "b cells"], words: float | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Text and image cross-entropy in nats per token, each a mean over the tokens of its kind.

    Slots without a text token are no targets; each kind has its own head, computed only where it is
    needed. Source: paper, §2.2.

    Args:
        words: what the sum over the text tokens is divided by; their own number unless it is given. Where a
            batch is taken in parts, with the mean number of a part the mean of the parts' losses is the
            batch's, whatever the parts.
    """
    text, image = model(tokens, codes)
    real = tokens >= 0
    logits = model.logits(model.text_head, text[:, :-1][real])
    shared = real.sum() if words is None else torch.tensor(words)
    text_loss = F.cross_entropy(logits, tokens[real], reduction="sum") / shared.clamp_min(1)
    cells = model.logits(model.image_head, image)
    return text_loss, F.cross_entropy(cells.flatten(0, 1), codes.flatten())
