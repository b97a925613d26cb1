"""Is the codebook alive? Counted over a window, because one batch cannot tell."""

import math
from collections import deque

import torch
from torch import Tensor

ALARM = 0.1  # share of codes in use below which training warns


class CodebookWindow:
    """Usage and perplexity of the codes chosen lately: at least the last 10·K of them."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.counts: deque[Tensor] = deque()
        self.total = torch.zeros(vocab_size, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        """Take in a batch of codes of any shape, and forget what the window no longer needs."""
        counts = torch.bincount(codes.flatten().cpu(), minlength=self.vocab_size)
        self.counts.append(counts)
        self.total += counts
        while int(self.total.sum() - self.counts[0].sum()) >= 10 * self.vocab_size:
            self.total -= self.counts.popleft()

    @property
    def full(self) -> bool:
        """Has it seen enough codes to judge?"""
        return int(self.total.sum()) >= 10 * self.vocab_size

    def metrics(self) -> dict[str, float]:
        """Share of codes in use, and exp(entropy) of their frequencies."""
        seen = self.total[self.total > 0].double()
        if len(seen) == 0:
            return {"codebook_usage": 0.0, "codebook_perplexity": 0.0}
        p = seen / seen.sum()
        return {
            "codebook_usage": len(seen) / self.vocab_size,
            "codebook_perplexity": math.exp(float(-(p * p.log()).sum())),
        }
