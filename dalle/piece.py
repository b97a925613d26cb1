"""What a process holds of a gradient, which all that comes between backward pass and optimizer works on."""

from typing import NamedTuple

from torch import Tensor, nn


class Piece(NamedTuple):
    """What this process holds of the gradient of one parameter, in fp32.

    Where the model is partitioned, `grad` is a run of the flattened parameter that begins at `offset`.
    Changing it in place changes what the update applies.
    """

    name: str
    parameter: nn.Parameter
    grad: Tensor
    offset: int
