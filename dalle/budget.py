"""A run that is to end in time: how many updates it makes is fitted to the machine while it trains.

The first seconds say little of a machine that others use, too: its rate changes threefold within minutes.
So the end is fitted again and again, and with it all schedules, which then end with the time.
"""

import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dalle.checkpoint import read_json, write_json
from dalle.config import to_json

if TYPE_CHECKING:
    from dalle.training import Training


class Budget:
    """Minutes, from now on, in which a run is to make its remaining updates.

    Args:
        minutes: above 0.
        training: how the run is to train; its `steps` are a guess.
        spans: names of its settings that keep their share of `steps`.
    """

    def __init__(self, minutes: float, training: "Training", spans: Collection[str]) -> None:
        self.deadline = time.monotonic() + 60 * minutes
        self.training, self.spans = training, spans

    @property
    def left(self) -> float:
        """Seconds; 0 when the time is over."""
        return max(0.0, self.deadline - time.monotonic())

    def steps(self, made: int, rate: float) -> int:
        """Updates in all, of which `made` are made: as many more as fit at `rate` a second."""
        return made + int(self.left * rate)

    def fitted(self, steps: int) -> "Training":
        """How to train with `steps` updates in all."""
        return lasting(self.training, steps, self.spans)


def lasting(training: "Training", steps: int, spans: Collection[str]) -> "Training":
    """The same training with another number of updates, of which the settings named keep their share."""
    share = steps / max(1, training.steps)
    return replace(training, steps=steps, **{span: round(getattr(training, span) * share) for span in spans})


def record(folder: Path, training: "Training") -> None:
    """Let the config.json of a stage say how it trains now, so that its continuation does likewise."""
    path = folder / "config.json"
    write_json(path, {**read_json(path), "training": to_json(training)})
