"""The evidence lower bound of stage 1 and its parts.

Everything is a mean over pictures and over what a picture consists of, so the loss does not depend
on the batch size, and its two terms weigh the same at any geometry.

Source: paper, §2.1 and App. A.2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle.noise import Noise
from stage1_dvae.likelihood import log_likelihood
from stage1_dvae.model import DVAE, most_probable
from stage1_dvae.posterior import posterior


@dataclass(frozen=True)
class Elbo:
    """The terms of the bound, as means that do not depend on the batch size."""

    nll: Tensor  # −ln f, nats per subpixel
    kl: Tensor  # nats per position
    usage: Tensor  # KL of the batch's mean posterior to uniform, nats; 0 when all codes share the work
    positions: int
    subpixels: int

    def loss(self, beta: float, usage_weight: float = 0.0) -> Tensor:
        """NLL + (β·KL + w·usage) / r, where r is subpixels per position: 192 at the paper's geometry."""
        ratio = self.subpixels / self.positions
        return self.nll + (beta * self.kl + usage_weight * self.usage) / ratio

    def metrics(self) -> dict[str, Tensor]:
        """Both terms in nats per picture, and their sum in bits per dimension (subpixel).

        Of a density on mapped pixels, so that it may be below 0; 8.3 more, log₂(255 / 0.8), are the bits of
        an 8-bit subpixel, which others report.
        """
        nll, kl = self.nll.detach() * self.subpixels, self.kl.detach() * self.positions
        bits = self.subpixels * math.log(2)
        return {
            "reconstruction_nats": nll,
            "kl_nats": kl,
            "reconstruction_bits_per_dim": nll / bits,
            "kl_bits_per_dim": kl / bits,
            "bits_per_dim": (nll + kl) / bits,
        }


def elbo(
    model: DVAE,
    pixels: Float[Tensor, "b 3 h w"],
    *,
    tau: float,
    generators: Sequence[Noise],
    mean_posterior: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Elbo, Int[Tensor, "b grid grid"], Float[Tensor, "b 6 h w"]]:
    """One relaxed sample of the bound.

    Args:
        tau: temperature of the relaxation.
        generators: of the noise, one for each picture.
        mean_posterior: from the mean posterior of these pictures to that of the whole batch, where they are
            a part of one; its gradient is taken to be the part's, so that the mean over the parts is right.

    Returns:
        Its terms, the most probable codes, and the decoder's output for the relaxed ones.
    """

    def of_some(pixels: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        logits = model.logits(pixels).float().permute(0, 2, 3, 1)  # codes last: softmax runs along memory
        q = posterior(logits.flatten(1, 2), tau, [generators[place] for place in places])
        decoded = model.decoder(q.relaxed.view_as(logits).permute(0, 3, 1, 2)).float()
        nll = -log_likelihood(pixels, decoded, model.config.pixel_std).mean((1, 2, 3))
        return nll, q.kl.mean(1), q.mean, most_probable(logits.detach()), decoded.detach()

    nll, kl, mean, codes, decoded = model.threads.apply(
        of_some, pixels, torch.arange(len(pixels)), parameters=list(model.parameters())
    )
    mean_q = mean.mean(0)
    if mean_posterior is not None:
        mean_q = mean_q + (mean_posterior(mean_q.detach()) - mean_q.detach())
    usage = (mean_q * (mean_q + 1e-12).log()).sum() + math.log(len(mean_q))
    subpixels = pixels[0].numel()
    return Elbo(nll.mean(), kl.mean(), usage, codes[0].numel(), subpixels), codes, decoded
