"""Gradients exchanged after the backward pass and during it, over a slow wire between two machines.

    python -m benchmarks.overlap

Two processes on this computer, a core each. What they send arrives when a wire of the given rate would have
delivered it, one message after another: whoever waits for it sleeps, and leaves the core alone.
"""

import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from dalle.distributed import joined
from dalle.engine import Engine
from dalle.launch import launch
from dalle.low_rank import paper_rank
from dalle.training import LargeTraining
from dalle.wiring import build, make_engine
from stage2_prior.config import PriorConfig
from stage2_prior.loss import losses, weighted
from stage2_prior.model import Prior

SHAPE = PriorConfig(text_length=32, text_vocab=128, image_vocab=128, grid=12, depth=8, width=512, heads=8)
BATCH, TIMES = 2, 5
RATES = (1000, 50)  # MB per second
SENDS = ("all_reduce", "all_to_all_single", "all_gather_into_tensor")


class SlowWire:
    """Lets everything that is sent arrive late. Rates are in bytes per second."""

    def __init__(self) -> None:
        self.rate, self.free = float("inf"), 0.0
        for name in SENDS:
            setattr(dist, name, self._late(getattr(dist, name)))

    def _late(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def sent(tensor: torch.Tensor, *arguments: Any, async_op: bool = False, **options: Any) -> Any:
            self.free = max(self.free, time.perf_counter()) + tensor.nbytes / self.rate
            message = _Message(send(tensor, *arguments, async_op=True, **options), self.free)
            return message if async_op else message.wait()

        return sent


class _Message:
    def __init__(self, sent: Any, arrives: float) -> None:
        self.sent, self.arrives = sent, arrives

    def wait(self) -> None:
        self.sent.wait()
        time.sleep(max(0.0, self.arrives - time.perf_counter()))


def engine_of(rank: int) -> Engine:
    """A prior whose gradients are compressed between the machines from the first update on."""
    config = LargeTraining(
        steps=1, batch_size=2 * BATCH, lr=1e-4, beta1=0.9, beta2=0.96, weight_decay=0.045, clip=4.0,
        ema_decay=0.99, ema_every=25, zero=0, precision="fp32", compression_rank=rank,
        compression_start=0, compression_sample=0,
    )  # fmt: skip
    model = build(lambda: Prior(SHAPE), config)
    return make_engine(model, config, "fp32", matrices=model.matrices())


def update(engine: Engine, tokens: torch.Tensor, codes: torch.Tensor, step: int) -> float:
    """The seconds of one."""
    dist.barrier()
    began = time.perf_counter()
    engine.backward(weighted(*engine.run(losses, engine.model, tokens, codes)), 1)
    engine.update(1e-4, step)
    return time.perf_counter() - began


def work() -> None:
    """What each process does."""
    torch.set_num_threads(1)
    with joined() as here:
        wire = SlowWire()
        engine = engine_of(paper_rank(SHAPE.width))
        buckets, compression = engine.buckets, engine.compression
        assert compression is not None
        tokens = torch.randint(SHAPE.text_vocab, (BATCH, SHAPE.text_length - 1))
        codes = torch.randint(SHAPE.image_vocab, (BATCH, SHAPE.cells))
        step = 0
        for rate in RATES:
            seconds: dict[tuple[str, str], list[float]] = {}
            wire.rate = 1e6 * rate
            for turn in range(1 + TIMES):  # the first one warms up
                for how, when in product(("in full", "compressed"), ("after", "during")):
                    compression.start = step + 1 if how == "in full" else 0
                    engine.buckets = buckets if when == "during" else None
                    step += 1
                    took = update(engine, tokens, codes, step)
                    if turn:
                        seconds.setdefault((how, when), []).append(took)
            if here.main:
                told = [f"{statistics.median(each):.2f} s" for each in seconds.values()]
                print(f"| {rate} MB/s | " + " | ".join(told) + " |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["work"]:
        work()
    else:
        print("| wire | in full, after the pass | during it | compressed, after | during |")
        print("|---|---|---|---|---|")
        assert launch(1, ["-m", "benchmarks.overlap", "work"], [sys.executable], machines=2) == 0
