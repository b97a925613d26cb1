"""The loss of a prior with matrices in fp32, in fp16 rounded at random, and in fp16 rounded to the nearest.

    python -m benchmarks.weights

All else is the same in the three: the data of `benchmarks.compression`, 16-bit moments, products in fp32, so
that the loss tells of nothing but the rounding of updates.
"""

import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.compression import BATCH, FOLDED, PICTURES, WORDS, write_data
from dalle import packed
from dalle.engine import Engine
from dalle.noise import keyed
from dalle.optim import Average
from dalle.scaling import Scaling
from dalle.schedules import cosine, warmup
from stage2_prior.config import PriorConfig
from stage2_prior.loss import losses, weighted
from stage2_prior.model import Prior

STEPS, WARM, LR, LAST = 600, 30, 5e-4, 50
Rounding = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
AT_RANDOM: Rounding = packed.rounded_at_random
RUNS: dict[str, tuple[bool, Rounding]] = {
    "fp32": (False, AT_RANDOM),
    "fp16, at random": (True, AT_RANDOM),
    "fp16, to the nearest": (True, lambda values, noise: values.half()),
}


def train(data: dict[str, torch.Tensor], halved: bool, rounded: Rounding) -> list[float]:
    """The loss of every update."""
    torch.manual_seed(0)
    shape = PriorConfig(
        text_length=20, text_vocab=WORDS, image_vocab=FOLDED, grid=math.isqrt(data["codes"].shape[1]),
        depth=4, width=128, heads=4,
    )  # fmt: skip
    model = Prior(shape)
    optimizer = packed.PackedAdamW(
        model, matrices=model.matrices(), halved=halved, betas=(0.9, 0.96), weight_decay=0.045
    )
    scaling = Scaling(model, dtype=torch.float32)
    average = Average(model.parameters(), 0.99, 25)
    engine = Engine(model, optimizer, average, clip=4.0, precision="fp32", scaling=scaling)
    found = []
    for step in range(STEPS):
        mine = torch.randint(PICTURES, (BATCH,), generator=keyed(torch.device("cpu"), 1, step))
        text, image = engine.run(losses, model, data["tokens"][mine], data["codes"][mine])
        loss = weighted(text, image)
        engine.backward(loss, 1)
        with patch.object(packed, "rounded_at_random", rounded):
            engine.update(warmup(step, WARM) * cosine(step, STEPS, LR, LR / 32), step + 1)
        found.append(loss.item())
    return found


def main() -> None:
    """Train all, print."""
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder) / "data.pt")
        data = torch.load(Path(folder) / "data.pt")
    found = {}
    for name, (halved, rounded) in RUNS.items():
        found[name] = train(data, halved, rounded)
        last = statistics.mean(found[name][-LAST:])
        print(
            f"| {name} | {last:.4f} | {last / statistics.mean(found['fp32'][-LAST:]) - 1:+.2%} |", flush=True
        )


if __name__ == "__main__":
    main()
