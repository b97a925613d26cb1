"""Step → value. Pure functions of the step, but for the plateau rule, which must remember losses."""

import math
from dataclasses import dataclass


def cosine(step: int, horizon: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `horizon`, constant afterwards.

    Source: paper, App. A.2 ("cosine schedule"; no restarts).
    """
    if horizon <= 0:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(step, horizon) / horizon))


def warmup(step: int, steps: int) -> float:
    """A factor that grows linearly to 1 over `steps` updates; the first update already moves."""
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0


@dataclass
class Plateau:
    """Halve the step size when the training loss stops falling, at most `limit` times.

    The authors did it by hand, five times; here a loss counts as falling while its running mean has
    improved by `margin` (relative) within the last `patience` updates.

    Source: paper, App. B.2.
    """

    patience: int
    margin: float = 1e-3
    limit: int = 5
    halvings: int = 0
    mean: float = math.nan
    best: float = math.inf
    since: int = 0

    def observe(self, loss: float) -> None:
        """Take in the training loss of one update."""
        if not math.isfinite(loss):
            return
        weight = 1 / max(1, self.patience // 4)
        self.mean = loss if math.isnan(self.mean) else self.mean + weight * (loss - self.mean)
        self.since += 1
        if self.mean < self.best - self.margin * abs(self.best if math.isfinite(self.best) else 0):
            self.best, self.since = self.mean, 0
        elif self.since >= self.patience and self.halvings < self.limit:
            self.halvings, self.since, self.best = self.halvings + 1, 0, self.mean

    @property
    def factor(self) -> float:
        """What the peak step size is multiplied by."""
        return 0.5**self.halvings
