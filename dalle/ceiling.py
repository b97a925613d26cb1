"""The rate of matrix products that this machine reaches: what the speed of training is measured against."""

from functools import cache

import torch

from dalle.precision import DTYPES, Arithmetic, best_seconds
from dalle.threads import Threads, cores

SIDES = {"cpu": 1024, "cuda": 8192}  # of square matrices; larger ones are no faster
TRIES = 5


@cache
def gemm_rate(device: torch.device, precision: Arithmetic) -> float:
    """FLOP/s of large square products in `precision`: the best of several.

    On a CPU, of one product on all cores or of one on each, whichever is faster; and of fp32 in place of
    fp16, which CPUs do not have: a product of this size would take seconds.
    """
    if device.type == "cpu" and precision == "fp16":
        return gemm_rate(device, "fp32")
    side, threads, dtype = SIDES[device.type], Threads(cores(device)), DTYPES[precision]
    # Random, because a GPU that is short of power multiplies equal numbers faster.
    squares = [torch.randn(2, side, side, device=device).to(dtype) for _ in range(threads.count)]

    def multiply(pair: torch.Tensor) -> None:
        pair[0] @ pair[1]
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    together = 2 * side**3 / best_seconds(lambda: multiply(squares[0]), TRIES)
    one_each = 2 * side**3 * len(squares) / best_seconds(lambda: threads.map(multiply, squares), TRIES)
    return max(together, one_each)
