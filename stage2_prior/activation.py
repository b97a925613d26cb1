"""The activation between the two matrices of an MLP."""

from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

STEEPNESS = 1.702


def gelu(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """x·sigmoid(1.702x), GELU's approximation by a sigmoid."""
    y: Tensor = _Gelu.apply(x) if torch.is_grad_enabled() else quick_gelu(x)
    return y


@no_type_check
def quick_gelu(x: Tensor, steepness: float = STEEPNESS) -> Tensor:
    """`gelu` without a gradient, as TorchScript can compile it, too."""
    return torch.mul(x, steepness).sigmoid_().mul_(x)


class _Gelu(torch.autograd.Function):
    """x·sigmoid(1.702x) in half the passes over memory, and with one tensor kept, that autograd would need.

    It is silu(1.702x) / 1.702, whose derivative torch has in one pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return quick_gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,), (x,) = grads, ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, STEEPNESS * x)
