"""The pieces of a batch side by side on the cores of a CPU: a thread each, forward and backward.

The layers of a small model are too short to be shared out one by one: threads inside of every operation
spend their time waiting for each other. Pieces of the batch have nothing in common but the weights.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

In = TypeVar("In")
Out = TypeVar("Out")


def cores(device: torch.device) -> int:
    """Threads worth having: torch's own number on a CPU that is one process's own."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return torch.get_num_threads() if device.type == "cpu" and alone else 1


class Threads:
    """`count` threads, which share the caller's cores; with one, everything stays in the caller's."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pool = ThreadPoolExecutor(count) if count > 1 else None

    def split(self, *columns: Tensor) -> list[tuple[Tensor, ...]]:
        """The rows of a batch in as many pieces as there are threads; fewer where there are fewer rows."""
        return list(zip(*(column.chunk(self.count) for column in columns), strict=True))

    def map(self, work: Callable[[In], Out], pieces: Sequence[In]) -> list[Out]:
        """`work` of every piece, in their order; under the caller's gradient mode and autocast."""
        if self.pool is None or len(pieces) == 1:
            return [work(piece) for piece in pieces]
        threads = torch.get_num_threads()
        gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def on_its_cores(piece: In) -> Out:
            torch.set_num_threads(max(1, threads // len(pieces)))
            with (
                torch.inference_mode(inference),
                torch.set_grad_enabled(gradients),
                torch.autocast("cpu", dtype, enabled=cast),
            ):
                return work(piece)

        try:
            return list(self.pool.map(on_its_cores, pieces))
        finally:
            torch.set_num_threads(threads)  # a part of this number holds for all threads of the process

    def summed(
        self,
        work: Callable[..., Tensor],
        pieces: Sequence[tuple[Tensor, ...]],
        parameters: Sequence[Tensor],
    ) -> Tensor:
        """The sum of `work(*piece)` over the pieces, differentiable by `parameters` alone.

        Gradients are added in the order of the pieces, so that the same run gives the same bits.
        """
        if self.pool is None or len(pieces) == 1 or not torch.is_grad_enabled():
            return torch.stack(self.map(lambda piece: work(*piece), pieces)).sum(0)
        total: Tensor = _Summed.apply(self, work, pieces, *parameters)
        return total


class _Summed(torch.autograd.Function):
    """One graph a piece, kept by the piece's own thread from the forward to the backward pass."""

    @staticmethod
    def forward(ctx: Any, threads: Threads, work: Any, pieces: Any, *parameters: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.sums = threads.map(lambda piece: work(*piece), pieces)
        ctx.threads, ctx.parameters = threads, parameters
        return torch.stack([part.detach() for part in ctx.sums]).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        def gradients(part: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(part, ctx.parameters, grad, allow_unused=True)

        first, *others = ctx.threads.map(gradients, ctx.sums)
        del ctx.sums
        used = [i for i, g in enumerate(first) if g is not None]
        for other in others:
            torch._foreach_add_([first[i] for i in used], [other[i] for i in used])
        return None, None, None, *first
