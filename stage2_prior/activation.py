"""The activation between the two matrices of an MLP."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def gelu(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """x·sigmoid(1.702x), GELU's approximation by a sigmoid."""
    y: Tensor = _Gelu.apply(x) if torch.is_grad_enabled() else _gelu(x)
    return y


@torch.no_grad()
def around_silu(up: nn.Linear, down: nn.Linear) -> tuple[nn.Linear, nn.Linear]:
    """Copies of an MLP's two matrices that do around a silu, up to rounding, what these do around `gelu`.

    gelu(x) is silu(1.702x) / 1.702, and one pass in place of three where the factors are in the weights.
    """
    up, down = copy.deepcopy(up), copy.deepcopy(down)
    up.weight.mul_(1.702)
    up.bias.mul_(1.702)
    down.weight.div_(1.702)
    return up, down


def _gelu(x: Tensor) -> Tensor:
    return torch.mul(x, 1.702).sigmoid_().mul_(x)


class _Gelu(torch.autograd.Function):
    """x·sigmoid(1.702x) in half the passes over memory, and with one tensor kept, that autograd would need.

    It is silu(1.702x) / 1.702, whose derivative torch has in one pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,), (x,) = grads, ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, 1.702 * x)
