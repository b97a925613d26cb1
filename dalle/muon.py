"""Muon: matrices move along their mean gradient made orthogonal, by which all its directions count alike.

A gradient's mean has a few strong directions, which decide the loss least, and many weak ones. Every
other parameter stays AdamW's. A small prior reaches a loss after half as many updates (docs/log.md).

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Not the paper's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from dalle.piece import Piece
from dalle.threads import Threads

MOMENTUM = 0.95
ROUNDS = 5
# Of x → a·x + b·x³ + c·x⁵, which takes every singular value from (0, 1] to near 1: between 0.68 and 1.14
# after five rounds for those that were at least a hundredth of the gradient's norm.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """The same singular vectors, every singular value near 1 (Newton–Schulz); 0 stays 0.

    On CUDA in bf16, whose rounding the rounds forgive.
    """
    a, b, c = QUINTIC
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    x = x / (x.norm() + 1e-7)
    wide = x if len(x) <= x.shape[1] else x.t()
    for _ in range(ROUNDS):
        square = wide @ wide.t()
        wide = a * wide + (b * square + c * square @ square) @ wide
    return (wide if len(x) <= x.shape[1] else wide.t()).to(matrix.dtype)


class Muon:
    """Turns the gradients of matrices into their steps, in units of AdamW's step size.

    Args:
        shapes: of the matrices, by the names of the parameters.
        ratio: of their step size to AdamW's.
        partitioned: does each of the processes `shards` (by default all) hold a run of every gradient?
            Each then puts them together, a matrix at a time, and keeps its run of the step.
        threads: take a matrix each: such small products gain nothing from threads inside of them.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        ratio: float,
        partitioned: bool = False,
        shards: Any = None,
        threads: Threads | None = None,
    ) -> None:
        self.shapes, self.ratio = dict(sorted(shapes.items())), ratio
        self.partitioned, self.shards, self.threads = partitioned, shards, threads or Threads(1)
        self.momenta: dict[str, Tensor] = {}  # this process' runs, flat

    @torch.no_grad()
    def turn(self, pieces: Sequence[Piece]) -> None:
        """Replace the matrices' gradients by their steps, in place; the others stay as they are."""
        held = {piece.name: piece for piece in pieces}
        device = pieces[0].grad.device if pieces else torch.device("cpu")
        every, count = list(self.shapes), self.threads.count
        for names in (every[at : at + count] for at in range(0, len(every), count)):
            whole = [self._ahead(name, held.get(name), device) for name in names]
            for name, step in zip(names, self.threads.map(orthogonal, whole), strict=True):
                if (piece := held.get(name)) is not None:
                    rows, columns = self.shapes[name]
                    run = step.flatten()[piece.offset :][: piece.grad.numel()]
                    piece.grad.copy_(run.view_as(piece.grad))
                    piece.grad.mul_(self.ratio * math.sqrt(max(1, rows / columns)))

    def _ahead(self, name: str, piece: Piece | None, device: torch.device) -> Tensor:
        """The whole mean gradient, a step ahead (Nesterov); `piece` is what this process holds of it."""
        whole = torch.zeros(math.prod(self.shapes[name]), device=device)
        if piece is not None:
            gradient = piece.grad.flatten()
            momentum = self.momenta.setdefault(name, torch.zeros_like(gradient))
            momentum.mul_(MOMENTUM).add_(gradient)
            torch.add(gradient, momentum, alpha=MOMENTUM, out=whole[piece.offset :][: len(gradient)])
        if self.partitioned:
            dist.all_reduce(whole, group=self.shards)
        return whole.view(self.shapes[name])

    def load(self, name: str, offset: int, size: int, saved: Tensor) -> None:
        """Take back this process' run of a saved mean gradient."""
        self.momenta[name] = saved.flatten()[offset : offset + size].clone()
