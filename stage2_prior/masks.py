"""Who may attend to whom: arithmetic on positions, written once.

The sequence is `text` text slots, then a `grid` × `grid` picture in raster order. Every slot sees all
text slots up to itself; image slots see all of the text, and of the picture

    row      the previous `grid` slots and themselves: one row's length back, around the edge
    column   the slots above in their column and themselves
    conv     the causal half of a kernel × kernel window, around the edges

`True` means: may attend. Everything else that knows about masks is held to `dense` in tests.

Source: paper, App. B.1 and Fig. 11.
"""

from functools import cache
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

Kind = Literal["row", "column", "conv"]


def kinds(depth: int) -> list[Kind]:
    """The mask of every layer: the last is conv; before it layer i is column where (i−2) mod 4 = 0."""
    return [
        "conv" if layer == depth else "column" if (layer - 2) % 4 == 0 else "row"
        for layer in range(1, depth + 1)
    ]


def allowed(kind: Kind, text: int, grid: int, q: Tensor, k: Tensor, kernel: int = 11) -> Tensor:
    """Whether query slots q may attend to key slots k; the two broadcast."""
    back = q - k  # how far back the key lies
    match kind:
        case "row":
            near = back <= grid
        case "column":
            near = back % grid == 0
        case "conv":
            half = kernel // 2
            near = torch.zeros_like(back, dtype=torch.bool)
            for rows in range(half + 1):
                near = near | ((back - rows * grid).abs() <= half)
    return (back >= 0) & ((k < text) | near)


def dense(kind: Kind, text: int, grid: int, kernel: int = 11) -> Bool[Tensor, "q k"]:
    """The mask as a matrix over all text + grid² slots."""
    slots = torch.arange(text + grid**2)
    return allowed(kind, text, grid, slots[:, None], slots[None, :], kernel)


@cache
def visible(kind: Kind, grid: int, kernel: int = 11) -> list[Tensor]:
    """For every image slot, the image slots that it sees (itself the last), in raster order."""
    with torch.inference_mode(False):  # they outlive the drawing that asks first
        return [row.nonzero()[:, 0] for row in dense(kind, 0, grid, kernel)]
