"""A start at which the dVAE already is a vector quantiser of patches, with every code in use.

From random weights a codebook needs long to come alive: codes that no cell chooses in the first hundreds
of updates never learn anything, and what survives codes one flat colour a cell. Clustering patches takes
seconds, and what training adds from there is what clusters lack: the surroundings of a cell.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle.errors import ConfigError, DataError
from stage1_dvae.config import DVAEConfig
from stage1_dvae.likelihood import EPSILON, map_pixels
from stage1_dvae.model import DVAE

SAMPLES = 32  # patches clustered for every code
ROUNDS = 8  # of assigning patches to the nearest centre and moving the centres
ROWS = 8192  # patches compared with all centres at once
SCALE = 0.2  # b of every pixel, in logits, at the start
SHARPEN = 16  # less noise between neighbouring clusters than their true widths would give


def pictures_needed(config: DVAEConfig) -> int:
    """How many pictures hold the patches to cluster, several times over: flat ones repeat."""
    return math.ceil(4 * SAMPLES * config.vocab_size / config.grid**2)


@torch.no_grad()
def start_from_patches(model: DVAE, pixels: Float[Tensor, "b 3 h w"], seed: int) -> None:
    """Set the weights so that code i stands for the i-th cluster of patches.

    The encoder's first layer gives a patch's principal components and their negatives, so that a ReLU
    loses nothing; its last layer their log-probability under each cluster, as an isotropic Gaussian. The
    decoder's table holds the clusters' own components, its last layer sums them up. Every resblock is the
    identity at first.

    Raises:
        ConfigError: a geometry in which the first and the last layer do not see the same patches.
        DataError: all pixels have one colour.
    """
    config = model.config
    if config.groups != 1 or config.codebook_width != config.hidden or config.hidden % 2:
        raise ConfigError(
            "start=patches needs groups=1, an even hidden and codebook_width=hidden, not "
            f"groups={config.groups}, hidden={config.hidden}, codebook_width={config.codebook_width}; "
            "or use start=random"
        )
    generator = torch.Generator().manual_seed(seed)
    patches = _patches(map_pixels(pixels), config.patch)
    patches, weights = _distinct(patches, SAMPLES * config.vocab_size, generator)
    if len(patches) < 2:
        raise DataError(
            f"start=patches needs pictures that show something, but all {len(pixels):,} looked at have one "
            "flat colour: give others"
        )
    centres = k_means(patches, weights, config.vocab_size, generator)

    half = config.hidden // 2
    parts = min(half, patches.shape[1])
    encoder: Any = model.encoder.blocks
    decoder: Any = model.decoder.blocks
    for name, weight in model.named_parameters():
        if ".conv_4." in name:
            weight.zero_()

    mean, basis = _components(patches, parts)
    spread = ((patches - mean) @ basis).std()
    first = encoder.input
    first.w.mul_(0.1)
    first.b.zero_()
    for rows, sign in ((slice(parts), 1), (slice(half, half + parts), -1)):
        first.w[rows] = 0
        first.w[rows, :, first.padding, first.padding] = sign * basis.t() / spread
        first.b[rows] = -sign * (mean @ basis) / spread

    near = (centres - mean) @ basis
    distances = _nearest((patches - mean) @ basis, near)[0]
    variance = (distances.square().mean() / SHARPEN).clamp_min(1e-4)
    last = encoder.output.conv
    last.w.zero_()
    last.w[:, :parts, 0, 0] = near * spread / variance
    last.w[:, half : half + parts, 0, 0] = -near * spread / variance
    last.b.copy_(-near.square().sum(1) / (2 * variance))

    mean, basis = _components(torch.logit(patches), parts)
    near = (torch.logit(centres.clamp(EPSILON, 1 - EPSILON)) - mean) @ basis
    spread = near.std()
    table = decoder.input
    table.b.zero_()
    table.w.zero_()
    table.w[:parts, :, 0, 0] = near.t() / spread
    table.w[half : half + parts, :, 0, 0] = -near.t() / spread
    shown = decoder.output.conv
    colours = len(mean)
    shown.w.zero_()
    shown.w[:colours, :parts, 0, 0] = basis * spread
    shown.w[:colours, half : half + parts, 0, 0] = -basis * spread
    shown.b[:colours] = mean
    shown.b[colours:] = math.log(SCALE)


def _patches(mapped: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "n d"]:
    return F.pixel_unshuffle(mapped, side).movedim(1, -1).flatten(0, 2)


def _distinct(
    patches: Float[Tensor, "n d"], most: int, generator: torch.Generator
) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
    """At most `most` different patches, and how much each counts: the root of how often it occurs.

    Else flat patches, which are most of a drawing, would be most of the codes.
    """
    levels, counts = torch.unique((patches * 1000).round().to(torch.int16), dim=0, return_counts=True)
    kept = torch.randperm(len(levels), generator=generator)[:most]
    commonest = counts.topk(min(64, len(counts))).indices
    kept = torch.cat([kept, commonest]).unique()
    return levels[kept].float() / 1000, counts[kept].float().sqrt()


def k_means(
    points: Float[Tensor, "n d"], weights: Float[Tensor, " n"], count: int, generator: torch.Generator
) -> Float[Tensor, "count d"]:
    """`count` centres of weighted points, begun far apart (k-means++, many centres at a time).

    Weights decide where centres begin, too: the rounds that follow hardly move one from what is rare to what
    is common.
    """
    mean = points.mean(0)
    points = points - mean  # or patches that are nearly alike would be so within the rounding of distances
    centres = points[weights.argmax()][None]
    distance = _nearest(points, centres)[0].square()
    while len(centres) < count and (apart := int((distance > 0).sum())):
        more = min(len(centres) // 4 + 1, count - len(centres), apart)
        chosen = points[torch.multinomial(distance * weights, more, generator=generator)]
        centres = torch.cat([centres, chosen])
        distance = torch.minimum(distance, _nearest(points, chosen)[0].square())
    if missing := count - len(centres):  # these codes share a patch, apart by less than a level of grey
        twins = centres[torch.randint(len(centres), (missing,), generator=generator)]
        centres = torch.cat([centres, twins + 1e-3 * torch.randn(twins.shape, generator=generator)])
    for _ in range(ROUNDS):
        owner = _nearest(points, centres)[1]
        mass = weights.new_zeros(count).index_add_(0, owner, weights)
        sums = torch.zeros_like(centres).index_add_(0, owner, points * weights[:, None])
        centres = torch.where(mass[:, None] > 0, sums / mass.clamp_min(1e-9)[:, None], centres)
    return centres + mean


def _nearest(points: Float[Tensor, "n d"], centres: Float[Tensor, "k d"]) -> tuple[Tensor, Tensor]:
    """The distance to the nearest centre and its index, `n` each."""
    found = [torch.cdist(part, centres).min(1) for part in points.split(ROWS)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def _components(points: Float[Tensor, "n d"], count: int) -> tuple[Float[Tensor, " d"], Float[Tensor, "d k"]]:
    """The mean of the points and the directions in which they spread most."""
    covariance = torch.cov(points.t()).reshape(points.shape[1], -1)
    return points.mean(0), torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :count]
