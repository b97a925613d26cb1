"""Attention's forms, forward and backward, on one thread: `python -m benchmarks.attention`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import time
from statistics import median

import torch

from dalle.process import suit_computing
from stage2_prior.backends import BACKENDS, Attend
from stage2_prior.config import PriorConfig
from stage2_prior.masks import Kind

TURNS = 7
SHAPES = {  # pictures, text slots, cells a side, width, heads
    "small": (8, 34, 8, 128, 4),
    "paper": (1, 256, 32, 512, 8),
}
KINDS: tuple[Kind, ...] = ("row", "column", "conv")


def main() -> None:
    """Time every form on the same numbers, in turn."""
    suit_computing()
    torch.set_num_threads(1)
    for name, (pictures, text, grid, width, heads) in SHAPES.items():
        config = PriorConfig(text_length=text, grid=grid, width=width, heads=heads, depth=3)
        qkv = torch.randn(pictures, config.length, 3 * width, requires_grad=True)
        gradient = torch.randn(pictures, config.length, width)
        for kind in KINDS:
            forms = {form: BACKENDS[form](config, kind) for form in ("dense", "block")}
            times: dict[str, list[float]] = {form: [] for form in forms}
            for turn in range(1 + TURNS):  # the first one warms up
                for form, attend in forms.items():
                    took = _thread_seconds(attend, qkv, heads, gradient)
                    if turn:
                        times[form].append(took)
            took = {form: median(samples) for form, samples in times.items()}
            print(
                f"{name:6} {kind:7} "
                + ", ".join(f"{form} {1e3 * seconds:6.1f} ms" for form, seconds in took.items())
                + f": {took['dense'] / took['block']:.2f} times faster"
            )


def _thread_seconds(attend: Attend, qkv: torch.Tensor, heads: int, gradient: torch.Tensor) -> float:
    start = time.thread_time()  # of this thread alone, whatever else runs
    attend(qkv, heads).backward(gradient)
    return time.thread_time() - start


if __name__ == "__main__":
    main()
