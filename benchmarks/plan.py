"""The memory that `dalle plan` predicts for one process, beside what training takes: ten small runs.

    python -m benchmarks.plan

Measured is the peak of what PyTorch's allocators gave out over two updates of the engine.
"""

import gc
import itertools
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dalle.cluster import Choice, Cluster
from dalle.engine import Engine
from dalle.forecast import memory
from dalle.optim import AdamW, Average
from dalle.packed import PackedAdamW
from dalle.scaling import Scaling
from stage2_prior.config import PriorConfig
from stage2_prior.loss import AT_ONCE, losses, weighted
from stage2_prior.model import Prior

SMALL = PriorConfig(text_length=32, text_vocab=512, image_vocab=512, grid=16, depth=4, width=128, heads=4)
WIDE = PriorConfig(text_length=64, text_vocab=1024, image_vocab=2048, grid=8, depth=6, width=384, heads=6)
DEEP = PriorConfig(text_length=64, text_vocab=512, image_vocab=1024, grid=16, depth=12, width=192, heads=4)
RUNS: list[tuple[PriorConfig, int, dict[str, Any]]] = [
    (SMALL, 8, {}),
    (SMALL, 8, {"recompute": True}),
    (SMALL, 2, {"precision": "bf16"}),
    (WIDE, 2, {}),
    (WIDE, 2, {"moments": "16bit"}),
    (WIDE, 2, {"precision": "fp16", "moments": "16bit"}),
    (WIDE, 2, {"precision": "fp16", "moments": "16bit", "weights": "fp16"}),
    (WIDE, 16, {"recompute": True}),
    (DEEP, 4, {}),
    (DEEP, 2, {"recompute": True, "moments": "16bit"}),
]


def train(
    config: PriorConfig, batch: int, recompute: bool, moments: str, precision: Any, weights: str
) -> None:
    """Two updates, all slots of the captions filled."""
    model = Prior(config)
    model.recompute = recompute
    model.attend_by("block")  # the form that `auto` is taken for
    betas, decay = (0.9, 0.96), 4.5e-2
    optimizer = (
        AdamW(model, betas=betas, weight_decay=decay)
        if moments == "fp32"
        else PackedAdamW(
            model, matrices=model.matrices(), halved=weights == "fp16", betas=betas, weight_decay=decay
        )
    )
    average, scaling = Average(model.parameters(), 0.99, 1), Scaling(model) if precision == "fp16" else None
    engine = Engine(model, optimizer, average, clip=4.0, precision=precision, scaling=scaling)
    tokens = torch.randint(config.text_vocab, (batch, config.text_length - 1))
    codes = torch.randint(config.image_vocab, (batch, config.cells))
    for step in (1, 2):
        with engine.arithmetic():
            loss = weighted(*losses(model, tokens, codes))
        engine.backward(loss, 1)
        engine.update(1e-4, step)


def measured(*run: Any) -> float:
    """Bytes at the worst moment."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        with torch.device("cuda"):
            train(*run)
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        train(*run)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def main() -> None:
    """A line for each run."""
    AT_ONCE["cpu"] = AT_ONCE["cuda"]  # a plan is for GPUs
    worst = 0.0
    one = Cluster(gpus=1, per_machine=1, memory=1e12, within=1e9, between=1e9, rate=1e12)
    for config, batch, options in RUNS:
        plain = {"recompute": False, "moments": "fp32", "precision": "fp32", "weights": "fp32"}
        o: dict[str, Any] = plain | options
        run = (o["recompute"], o["moments"], o["precision"], o["weights"])
        choice = Choice(0, o["moments"], o["recompute"], batch, weights=o["weights"])
        predicted, found = memory(config, choice, one, o["precision"]).total, measured(config, batch, *run)
        worst = max(worst, abs(predicted / found - 1))
        told = ", ".join(f"{name}={value}" for name, value in options.items()) or "as it is"
        print(
            f"| {config.depth} layers of {config.width}, {config.length} slots, batch {batch}, {told} "
            f"| {predicted / 1e6:.1f} MB | {found / 1e6:.1f} MB | {predicted / found - 1:+.1%} |"
        )
    print(f"at most {worst:.1%} off")


if __name__ == "__main__":
    main()
