"""What image tokens have in common: a vector each, and one MLP that reads all of them.

Two codes that decode to nearly the same patch want nearly the same embedding and row of the head, which a
table learns for each code by itself, from the few pictures that hold it. Here both are a sum: a row of a
table, and what the MLP makes of the code's vector, which begins as the dVAE's. So what is learned of one
code holds for those like it. Not the paper's; what it gains stands in docs/log.md.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dalle.precision import fp32_linear
from stage2_prior.activation import gelu
from stage2_prior.config import PriorConfig

WIDENING = 2  # hidden channels of the MLP for each channel of the residual stream
AFTER_GELU = 0.65  # root mean square of x·sigmoid(1.702x) where x is N(0, 1)


class _Linear(nn.Linear):
    """In fp32, as the tables that it makes."""

    def forward(self, input: Tensor) -> Tensor:
        return fp32_linear(input, self.weight, self.bias)


class CodeVectors(nn.Module):
    """A part of every image token's embedding, and of its row of the head."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        hidden = WIDENING * config.width
        self.vectors = nn.Parameter(torch.empty(config.image_vocab, config.code_channels))
        self.up = _Linear(config.code_channels, hidden)
        self.embedding = _Linear(hidden, config.width, bias=False)
        self.head = _Linear(hidden, config.width, bias=False)

    def forward(self) -> tuple[Float[Tensor, "v w"], Float[Tensor, "v w"]]:
        """The parts of the embeddings and of the head's rows, of all codes; in fp32, as those are."""
        hidden = gelu(self.up(self.vectors))
        return self.embedding(hidden), self.head(hidden)

    def spreads(self, embedding: float, head: float) -> Iterator[tuple[Tensor, float]]:
        """Standard deviations at the start that give the two parts those of `embedding` and `head`."""
        yield self.vectors, 1.0
        yield self.up.weight, 1 / math.sqrt(self.up.in_features)
        yield self.up.bias, 0.0
        yield self.embedding.weight, embedding / self._hidden
        yield self.head.weight, head / self._hidden

    @property
    def _hidden(self) -> float:
        """How long the hidden layer is for a vector of N(0, 1)."""
        return AFTER_GELU * math.sqrt(self.up.out_features)

    @torch.no_grad()
    def start_from(self, vectors: Float[Tensor, "v c"], head: float, seed: int) -> None:
        """Take the principal components of the dVAE's vectors, with a mean square of 1, and a head off zero.

        Args:
            vectors: one for each code.
            head: standard deviation of the head's rows.
            seed: of the draw that gives it.
        """
        placed = principal_components(vectors, self.vectors.shape[1])
        self.vectors.copy_(placed / placed.square().mean().sqrt().clamp_min(1e-6))
        drawn = torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(seed))
        self.head.weight.copy_(drawn * head / self._hidden)


def principal_components(vectors: Float[Tensor, "v c"], n: int) -> Float[Tensor, "v n"]:
    """Each vector's coordinates along the first n principal components; 0 where there are fewer."""
    centred = vectors - vectors.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:n]
    return nn.functional.pad(centred @ directions.t(), (0, n - len(directions)))
