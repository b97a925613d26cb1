"""Muon: matrices move along their mean gradient made orthogonal, by which all its directions count alike.

A gradient's mean has a few strong directions, which decide the loss least, and many weak ones. Every
other parameter stays AdamW's. A small prior reaches the same loss in half as many updates (docs/log.md).

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Not the paper's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from dalle.piece import Piece, device_of

MOMENTUM = 0.95
AT_ONCE = 2**24  # numbers in the matrices that are turned together
ROUNDS = 5
# Of x → a·x + b·x³ + c·x⁵, which takes every singular value from (0, 1] to near 1: between 0.68 and 1.14
# after five rounds for those that were at least a hundredth of the gradient's norm.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(
    matrices: Float[Tensor, "*b m n"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*b m n"]:
    """The same singular vectors, every singular value near 1 (Newton–Schulz); 0 stays 0.

    Args:
        dtype: of the products; the rounds forgive the rounding of bf16.
    """
    a, b, c = QUINTIC
    tall = _tall(matrices.shape[-2:])
    x = (matrices.mT if tall else matrices).float()
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    shape, x = x.shape, x.reshape(-1, *x.shape[-2:])
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    x = x.view(shape).to(matrices.dtype)
    return x.mT if tall else x


def _tall(shape: Sequence[int]) -> bool:
    return shape[0] > shape[1]


class Muon:
    """Turns the gradients of matrices into their steps, in units of AdamW's step size.

    Args:
        shapes: of the matrices, by the names of the parameters.
        ratio: of their step size to AdamW's.
        partitioned: does each of the processes `shards` (by default all) hold a run of every gradient?
            Each then puts them together, a matrix at a time, and keeps its run of the step.
        dtype: see `orthogonal`.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        ratio: float,
        partitioned: bool = False,
        shards: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shapes, self.ratio, self.dtype = dict(sorted(shapes.items())), ratio, dtype
        self.partitioned, self.shards = partitioned, shards
        self.alike = list(self._alike())
        self.momenta: dict[str, Tensor] = {}  # this process' shares, flat

    @torch.no_grad()
    def turn(self, pieces: Sequence[Piece]) -> None:
        """Replace the matrices' gradients by their steps, in place; the others stay as they are."""
        held = {piece.name: piece for piece in pieces}
        device = device_of(pieces)
        for names in self.alike:
            ahead = [self._ahead(name, held.get(name), device) for name in names]
            wide = torch.stack([whole.t() if _tall(whole.shape) else whole for whole in ahead])
            for name, step in zip(names, orthogonal(wide, self.dtype), strict=True):
                if (piece := held.get(name)) is not None:
                    rows, columns = self.shapes[name]
                    step = step.t() if _tall(self.shapes[name]) else step
                    run = step.flatten()[piece.offset :][: piece.grad.numel()]
                    piece.grad.copy_(run.view_as(piece.grad))
                    piece.grad.mul_(self.ratio * math.sqrt(max(1, rows / columns)))

    def _alike(self) -> Iterator[list[str]]:
        """Names of matrices that are of one shape but for which side is the longer; a few at a time."""

        def sides(name: str) -> list[int]:
            return sorted(self.shapes[name])

        for (rows, columns), group in groupby(sorted(self.shapes, key=sides), sides):
            names, count = list(group), max(1, AT_ONCE // (rows * columns))
            yield from (names[at : at + count] for at in range(0, len(names), count))

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
        """Take back this process' share of a saved mean gradient."""
        self.momenta[name] = saved.flatten()[offset : offset + size].clone()
