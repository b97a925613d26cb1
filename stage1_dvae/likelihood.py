"""The distribution of a pixel given its code: logit-Laplace on a shrunken range, or Gaussian there.

Source: paper, App. A.3; openai/DALL-E, dall_e/utils.py.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

EPSILON = 0.1  # keeps targets away from 0 and 1, where the density is not defined


def map_pixels(pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Pixels in [0, 1] to mapped pixels in [ε, 1−ε]."""
    return (1 - 2 * EPSILON) * pixels + EPSILON


def unmap_pixels(mapped: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """The inverse of `map_pixels`, clamped to [0, 1]."""
    return torch.clamp((mapped - EPSILON) / (1 - 2 * EPSILON), 0, 1)


def log_density(
    mapped: Float[Tensor, "b c h w"], mu: Float[Tensor, "b c h w"], ln_b: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """Log-density of the logit-Laplace distribution, elementwise, in nats.

        f(x | μ, b) = exp(−|logit(x) − μ| / b) / (2 b x (1 − x)),   0 < x < 1

    Args:
        mapped: x, strictly between 0 and 1 (see `map_pixels`).
        mu: location, in logits; sigmoid(μ) is the median, shown as the reconstruction.
        ln_b: natural logarithm of the scale b.

    Returns:
        ln f for every channel of every pixel; summed over c, h and w it is in nats per picture.
    """
    log_x, log_1_x = mapped.log(), torch.log1p(-mapped)
    return -(log_x - log_1_x - mu).abs() * torch.exp(-ln_b) - ln_b - math.log(2) - log_x - log_1_x


def gaussian_log_density(
    mapped: Float[Tensor, "b c h w"], mu: Float[Tensor, "b c h w"], std: float
) -> Float[Tensor, "b c h w"]:
    """Log-density of mapped pixels that are Gaussian around sigmoid(μ), elementwise, in nats.

    The logit-Laplace distribution asks for medians: within minutes of training it buys ever sharper flat
    areas with the edges of small things. A squared error, at a fixed width, minds large errors most.
    """
    return -(mapped - F.sigmoid(mu)).square() / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))


def log_likelihood(
    pixels: Float[Tensor, "b 3 h w"], parameters: Float[Tensor, "b 6 h w"], std: float | None
) -> Float[Tensor, "b 3 h w"]:
    """Log-density of every subpixel for the decoder's output, in nats: Gaussian where `std` is given."""
    mapped, (mu, ln_b) = map_pixels(pixels), parameters.float().chunk(2, 1)
    return log_density(mapped, mu, ln_b) if std is None else gaussian_log_density(mapped, mu, std)


def reconstruction(parameters: Float[Tensor, "b 6 h w"]) -> Float[Tensor, "b 3 h w"]:
    """The picture to show for the decoder's output: the median of every pixel, in [0, 1]."""
    return unmap_pixels(F.sigmoid(parameters[:, :3].float()))
