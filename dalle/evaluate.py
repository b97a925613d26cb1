"""How many held-out prompts of the built-in scenes a model draws right, read by their judge."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from PIL.Image import Image

from dalle.errors import ConfigError
from dalle.scenes.facts import Kind
from dalle.scenes.judge import Verdict, judge
from dalle.scenes.source import Scenes
from dalle.scenes.splits import Split
from stage2_prior.sample import Sampling

# What is asked for: the split of the scenes, and which of its kinds. No picture of these is ever trained on.
SPLITS: dict[str, tuple[Split, Kind | None]] = {
    "singles": ("heldout", "single"),
    "two_objects": ("heldout", "pair"),
    "counts": ("heldout", "count"),
    "pairs": ("pairs", None),
    "relations": ("relations", None),
    "wordings": ("wordings", None),
}
TITLES = {
    "singles": "one object",
    "two_objects": "two objects",
    "counts": "two to four equal objects",
    "pairs": "colour and shape never seen together",
    "relations": "shapes never seen in that relation",
    "wordings": "wordings never seen",
}
AT_ONCE = 64  # prompts that are drawn side by side, between two reports of progress


@dataclass(frozen=True)
class Drawing:
    """One prompt of a split, what was drawn for it, and what the judge says."""

    prompt: str
    picture: Image
    verdict: Verdict


@dataclass
class Score:
    """The drawings of one split, one for each prompt."""

    drawings: list[Drawing] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def right(self) -> int:
        """How many drawings show everything that was asked for."""
        return sum(drawing.verdict.right for drawing in self.drawings)

    def facts(self) -> dict[str, tuple[int, int]]:
        """For every kind of fact: how often it was asked for, and how often it holds."""
        counted: dict[str, tuple[int, int]] = {}
        for drawing in self.drawings:
            for fact, holds in drawing.verdict.holds.items():
                asked, right = counted.get(fact, (0, 0))
                counted[fact] = asked + 1, right + holds
        return counted

    def to_json(self) -> dict[str, Any]:
        """What `report.json` says of the split."""
        facts = {fact: {"prompts": asked, "right": right} for fact, (asked, right) in self.facts().items()}
        return {"prompts": len(self.drawings), "right": self.right, "facts": facts, "seconds": self.seconds}


def interval(right: int, asked: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share."""
    z, p = 1.96, right / asked
    middle = (p + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked)) / (1 + z * z / asked)
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    model: Callable[..., list[Image]],
    prompts: int,
    *,
    seed: int = 0,
    sampling: Sampling | None = None,
    on_drawn: Callable[[int], None] | None = None,
) -> dict[str, Score]:
    """Draw one picture for each of `prompts` prompts of every split, and judge it.

    Args:
        model: a `TextToImage`, or what is called like one.
        on_drawn: called with the number of pictures drawn since the last call.

    Raises:
        ConfigError: fewer than one prompt.
    """
    if prompts < 1:
        raise ConfigError(f"prompts={prompts} must be at least 1")
    return {
        name: _score(model, Scenes(split), kind, prompts, seed, sampling, on_drawn)
        for name, (split, kind) in SPLITS.items()
    }


def _score(
    model: Callable[..., list[Image]],
    scenes: Scenes,
    kind: Kind | None,
    prompts: int,
    seed: int,
    sampling: Sampling | None,
    on_drawn: Callable[[int], None] | None,
) -> Score:
    wanted = (i for i in range(len(scenes)) if kind is None or scenes.scene(i).kind == kind)
    indices = list(islice(wanted, prompts))
    score, began = Score(), time.monotonic()
    for start in range(0, len(indices), AT_ONCE):
        part = indices[start : start + AT_ONCE]
        captions = [scenes.captions(i)[0] for i in part]
        pictures = model(captions, seed=range(seed + start, seed + start + len(part)), sampling=sampling)
        for i, caption, picture in zip(part, captions, pictures, strict=True):
            score.drawings.append(Drawing(caption, picture, judge(picture, scenes.facts(i))))
        if on_drawn is not None:
            on_drawn(len(part))
    score.seconds = time.monotonic() - began
    return score
