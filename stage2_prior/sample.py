"""Drawing: one code after another, each given the text and the codes before."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle.errors import ConfigError
from dalle.text import NO_TOKEN
from stage2_prior.model import Prior


@dataclass(frozen=True)
class Sampling:
    """How a code is drawn from its distribution. The paper draws with temperature 1 and no cuts (§3.1).

    Guidance g makes the logits u + g·(c − u), c those given the caption and u those given none (Ho and
    Salimans 2021, arXiv:2207.12598): beyond 1 what the caption asks for counts more. The paper has none.
    """

    temperature: float = 1.0  # 0: always the most probable code
    top_k: int | None = None  # only the k most probable codes
    top_p: float | None = None  # only the most probable codes that together reach probability p
    guidance: float | None = None  # None: the model's own, or none

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be a number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.guidance is not None and not 0 <= self.guidance < float("inf"):
            raise ConfigError(f"guidance={self.guidance} must be a number of at least 0")


def noise(seed: int, pictures: range, cells: int) -> Float[Tensor, "n cells"]:
    """One number in [0, 1) for every cell of every picture, a function of (seed, picture, cell) alone.

    So picture 3 of 16 is picture 3 of 4, whatever is drawn together with it.
    """
    rows = [np.random.default_rng((seed, picture)).random(cells, dtype=np.float32) for picture in pictures]
    return torch.from_numpy(np.stack(rows))


def choose(logits: Float[Tensor, "b v"], uniform: Float[Tensor, " b"], how: Sampling) -> Int[Tensor, " b"]:
    """Draw a code from each row: the one in whose share of [0, 1) the row's uniform number falls."""
    if how.temperature == 0:
        return logits.argmax(-1)
    logits = logits / how.temperature
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        least = logits.topk(how.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = torch.softmax(logits, -1)
    if how.top_p is not None:
        ordered, order = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the most probable code always stays
        p = p.scatter(-1, order, ordered.masked_fill(before >= how.top_p, 0.0))
    edges = p.double().cumsum(-1)
    drawn = torch.searchsorted(edges, (uniform.double() * edges[:, -1])[:, None], right=True)[:, 0]
    # A uniform number rounded up to the last edge would fall beyond it, or onto codes of probability 0.
    last = logits.shape[-1] - 1 - (p > 0).flip(-1).int().argmax(-1)
    return torch.minimum(drawn, last)


@torch.inference_mode()
def draw(
    model: Prior,
    tokens: Int[Tensor, "p words"],
    uniform: Float[Tensor, "b cells"],
    how: Sampling,
) -> Iterator[Int[Tensor, " b"]]:
    """Draw b = p·n pictures, n of each prompt in turn; yields the codes cell by cell, in raster order.

    Args:
        tokens: one row a prompt, −1 where there is no token.
        uniform: the noise, one row a picture (see `noise`).

    Raises:
        ConfigError: the logits are not finite: the model's weights are broken.
    """
    guidance = 1.0 if how.guidance is None else how.guidance
    guided = guidance != 1
    n = len(uniform) // len(tokens)
    caches = model.prefill(torch.cat([tokens, torch.full_like(tokens, NO_TOKEN)]) if guided else tokens, n)
    codes = None
    for slot in range(model.config.cells):
        before = torch.cat([codes, codes]) if guided and codes is not None else codes
        logits = model.step(before, caches, slot)
        if guided:
            given, without = logits.chunk(2)
            logits = torch.lerp(without, given, guidance)
        if not logits.isfinite().all():
            raise ConfigError(f"the prior's logits are not finite at cell {slot}: its weights are broken")
        codes = choose(logits, uniform[:, slot].to(logits.device), how)
        yield codes
