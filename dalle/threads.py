"""The pieces of a batch side by side on the cores of a CPU: a thread each, forward and backward.

The layers of a small model are too short to be shared out one by one: threads inside of every operation
spend their time waiting for each other. Pieces of the batch have nothing in common but the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

In = TypeVar("In")
Out = TypeVar("Out")


def cores(device: torch.device) -> int:
    """Threads worth having: torch's own number on a CPU that is one process's own."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return torch.get_num_threads() if device.type == "cpu" and alone else 1


@contextmanager
def using(count: int) -> Iterator[None]:
    """While it lasts, torch's operations have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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

    def apply(
        self, work: Callable[..., Tensor], *columns: Tensor, parameters: Sequence[Tensor] = ()
    ) -> Tensor:
        """`work(*columns)` by pieces of rows, one below the other.

        Differentiable by the columns and by `parameters`, whatever else `work` depends on. Gradients are
        added in the order of the pieces, so that the same run gives the same bits.
        """
        if self.pool is None or len(columns[0]) == 1:
            return work(*columns)
        if not torch.is_grad_enabled():
            return torch.cat(self.map(lambda piece: work(*piece), self.split(*columns)))
        y: Tensor = _Pieces.apply(self, work, len(columns), *columns, *parameters)
        return y


class _Pieces(torch.autograd.Function):
    """One graph a piece, kept from the forward to the backward pass, both of which have a thread a piece."""

    @staticmethod
    def forward(ctx: Any, threads: Threads, work: Any, count: int, *tensors: Tensor) -> Tensor:
        columns, ctx.parameters = tensors[:count], tensors[count:]
        ctx.threads, ctx.wanted = threads, [column.requires_grad for column in columns]

        def run(piece: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
            pairs = zip(piece, ctx.wanted, strict=True)
            piece = tuple(part.detach().requires_grad_(wanted) for part, wanted in pairs)
            return piece, work(*piece)

        with torch.enable_grad():
            ctx.pieces = threads.map(run, threads.split(*columns))
        return torch.cat([y.detach() for _, y in ctx.pieces])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def run(
            part: tuple[tuple[tuple[Tensor, ...], Tensor], Tensor],
        ) -> tuple[list[Tensor], list[Tensor | None]]:
            (piece, y), grad = part
            columns = [column for column in piece if column.requires_grad]
            found = torch.autograd.grad(y, [*columns, *ctx.parameters], grad, allow_unused=True)
            zeros = [torch.zeros_like(c) if g is None else g for c, g in zip(columns, found, strict=False)]
            return zeros, list(found[len(columns) :])

        lengths = [len(y) for _, y in ctx.pieces]
        parts = ctx.threads.map(run, list(zip(ctx.pieces, grads[0].split(lengths), strict=True)))
        del ctx.pieces
        (_, total), *others = parts
        used = [i for i, g in enumerate(total) if g is not None]
        for _, other in others:
            torch._foreach_add_([total[i] for i in used], [other[i] for i in used])
        columns = iter([torch.cat(pieces) for pieces in zip(*(columns for columns, _ in parts), strict=True)])
        return None, None, None, *(next(columns) if wanted else None for wanted in ctx.wanted), *total
