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
    """Threads to use: torch's number on a CPU that this process has to itself, otherwise 1."""
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

    def apply(self, work: Callable[..., Out], *columns: Tensor, parameters: Sequence[Tensor] = ()) -> Out:
        """`work(*columns)`, a tensor or a tuple of them, by pieces of rows, one below the other.

        Differentiable by `parameters`, whatever else `work` depends on. Gradients are added in the order of
        the pieces, so that the same run gives the same bits.
        """
        if self.pool is None or len(columns[0]) == 1:
            return work(*columns)
        pieces = self.split(*columns)
        if not torch.is_grad_enabled():
            return _joined(self.map(lambda piece: work(*piece), pieces))
        whole: Out = _Pieces.apply(self, work, pieces, *parameters)
        return whole


def _joined(pieces: Sequence[Any]) -> Any:
    if isinstance(pieces[0], Tensor):
        return torch.cat([*pieces])
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def _each(y: Any) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else y


class _Pieces(torch.autograd.Function):
    """One graph a piece, kept from the forward to the backward pass, both of which have a thread a piece."""

    @staticmethod
    def forward(
        ctx: Any, threads: Threads, work: Any, pieces: list[tuple[Tensor, ...]], *parameters: Tensor
    ) -> Any:
        with torch.enable_grad():
            found = threads.map(lambda piece: work(*piece), pieces)
        whole = _joined(found)
        ctx.threads, ctx.found, ctx.parameters = threads, [_each(y) for y in found], parameters
        idle = [y for y, part in zip(_each(whole), ctx.found[0], strict=True) if not part.requires_grad]
        ctx.mark_non_differentiable(*idle)
        ctx.set_materialize_grads(False)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        def run(piece: tuple[list[Tensor], list[Tensor]]) -> list[Tensor | None]:
            return list(torch.autograd.grad(piece[0], ctx.parameters, piece[1], allow_unused=True))

        pieces: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in ctx.found]
        for grad, parts in zip(grads, zip(*ctx.found, strict=True), strict=True):
            if grad is not None:
                slopes = grad.split([len(part) for part in parts])
                for (y, of_y), part, slope in zip(pieces, parts, slopes, strict=True):
                    y.append(part)
                    of_y.append(slope)
        total, *others = ctx.threads.map(run, pieces)
        del ctx.found
        used = [i for i, g in enumerate(total) if g is not None]
        for other in others:
            torch._foreach_add_([total[i] for i in used], [other[i] for i in used])
        return None, None, None, *total
