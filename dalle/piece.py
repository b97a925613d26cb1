"""What a process holds of a gradient, which all that comes between backward pass and optimizer works on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
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


def device_of(pieces: Sequence[Piece]) -> torch.device:
    """Where they lie."""
    return pieces[0].grad.device if pieces else torch.device("cpu")


def gradient_of(parameter: Tensor) -> Tensor | None:
    """Its gradient in fp32, which autograd keeps for all but parameters in fp16: see `dalle.boundary`."""
    if parameter.dtype == torch.float16:
        return getattr(parameter, "main_grad", None)
    return parameter.grad
