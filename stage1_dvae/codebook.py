"""Is the codebook alive? Counted over a window, because one batch cannot tell."""

from collections import deque

import torch
from torch import Tensor

ALARM = 0.1  # share of codes in use below which training warns


class CodebookWindow:
    """Usage and perplexity of the codes chosen lately: at least the last 10·K of them.

    Counted where the codes lie, so that a GPU does not wait for the host in the middle of an update.
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.vocab_size = vocab_size
        self.batches: deque[tuple[int, Tensor]] = deque()  # how many codes, and how often each
        self.seen = 0
        self.total = torch.zeros(vocab_size, dtype=torch.int64, device=device)

    def add(self, codes: Tensor) -> None:
        """Take in a batch of codes of any shape, and forget what the window no longer needs."""
        chosen = codes.flatten()
        counts = torch.zeros_like(self.total).scatter_add_(0, chosen, torch.ones_like(chosen))
        self.batches.append((len(chosen), counts))
        self.seen += len(chosen)
        self.total += counts
        while self.seen - self.batches[0][0] >= 10 * self.vocab_size:
            forgotten, counts = self.batches.popleft()
            self.seen -= forgotten
            self.total -= counts

    @property
    def full(self) -> bool:
        """Has it seen enough codes to judge?"""
        return self.seen >= 10 * self.vocab_size

    def metrics(self) -> dict[str, Tensor]:
        """Share of codes in use, and exp(entropy) of their frequencies; 0 before the first code."""
        p = self.total.double() / max(1, self.seen)
        perplexity = torch.special.entr(p).sum().exp()
        return {
            "codebook_usage": (self.total > 0).double().mean(),
            "codebook_perplexity": perplexity if self.seen else torch.zeros_like(perplexity),
        }
