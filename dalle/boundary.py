"""Resblocks that run in 16 bits, each with a gradient scale of its own.

    forward    x ─┬─ enter ─ LayerNorm ─ to 16 bits ─ attention or MLP ─ leave ─┬─ x + branch
                  └──────────────────────── fp32 ────────────────────────────────┘
    backward   leave:  filter, × scale, to 16 bits
               enter:  ÷ scale, filter

The identity path and its gradient are fp32; so are gains and biases, with their gradients. Parameters pass
into the branch through a boundary of their own, which takes the scale off their gradients: an optimizer, or
an engine that shards them, only ever meets plain fp32 gradients. To filter is to replace what is not finite
by 0, so that an overflow stays in its resblock; parameter gradients are not filtered, for they tell of it
(`dalle.scaling`). A weight that is itself fp16 has its gradient gathered in fp32 as `main_grad`.

Without a boundary (fp32, bf16) the layers here are torch's own.

Source: paper, App. D and Fig. 4.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (scale,) = grads, ctx.saved_tensors
        return _filter(grad.float() / scale), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = y.dtype
        return y.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (scale,) = grads, ctx.saved_tensors
        # Filtered before it is scaled: what the scale itself makes overflow must reach the parameters.
        return (_filter(grad) * scale).to(ctx.dtype), None


class _Parameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.half = p if p.dtype == torch.float16 else None
        return p.to(dtype) if p.dtype != dtype else p.view_as(p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,), (scale,) = grads, ctx.saved_tensors
        plain = grad.float() / scale
        if ctx.half is None:
            return plain, None, None
        gathered = getattr(ctx.half, "main_grad", None)  # autograd would round it to fp16, without a scale
        ctx.half.main_grad = plain if gathered is None else gathered.add_(plain)
        return None, None, None


def _filter(grad: Tensor) -> Tensor:
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True, eq=False)
class Boundary:
    """Around the branch of one resblock.

    Args:
        scale: what gradients inside are multiplied by. It may change between updates, in place.
        dtype: of the matrix products inside.
    """

    scale: Float[Tensor, ""]
    dtype: torch.dtype

    def enter(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """From the identity path to the branch; both fp32."""
        return _Enter.apply(x, self.scale)

    def leave(self, y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """From the branch, in 16 bits, to the identity path, in fp32."""
        return _Leave.apply(y, self.scale)

    def parameter(self, p: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
        """A parameter for use inside, as `dtype`; its gradient comes out in fp32 without the scale."""
        return _Parameter.apply(p, self.scale, dtype)


class Linear(nn.Linear):
    """torch's, which inside a boundary multiplies in 16 bits and keeps its bias in fp32.

    The weight may be held in fp16.
    """

    boundary: Boundary | None = None

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """Outside of a boundary, input · weightᵀ + bias as torch has it."""
        inside = self.boundary
        if inside is None:
            return F.linear(input, self.weight.to(input.dtype), self.bias)
        product = F.linear(input, inside.parameter(self.weight, inside.dtype))
        return (product + inside.parameter(self.bias, torch.float32)).to(inside.dtype)


class LayerNorm(nn.LayerNorm):
    """torch's, which inside a boundary computes in fp32 and hands on 16 bits."""

    boundary: Boundary | None = None

    def forward(self, input: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        """The input with mean 0 and variance 1 in its last axis, times the gain, plus the bias."""
        inside = self.boundary
        if inside is None:
            return super().forward(input)
        gain = inside.parameter(self.weight, torch.float32)
        bias = inside.parameter(self.bias, torch.float32)
        return F.layer_norm(input.float(), self.normalized_shape, gain, bias, self.eps).to(inside.dtype)


def residual(x: Float[Tensor, "*b w"], norm: LayerNorm, branch: nn.Module) -> Float[Tensor, "*b w"]:
    """One resblock: x + branch(norm(x)), the branch within its boundary where it has one."""
    if norm.boundary is None:
        return x + branch(norm(x))
    return x + norm.boundary.leave(branch(norm(norm.boundary.enter(x))))


def enclose(resblock: nn.Module, boundary: Boundary) -> None:
    """Let `resblock` run within `boundary` from now on.

    Raises:
        TypeError: it has parameters that no layer of this module passes through the boundary; their
            gradients would come out with the scale on them.
    """
    for name, module in resblock.named_modules():
        if isinstance(module, (Linear, LayerNorm)):
            module.boundary = boundary
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"{name or 'the resblock'} is a {type(module).__name__}, which knows no boundary")


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Without the boundaries within `model`: its layers are torch's own until the end."""
    layers = [m for m in model.modules() if isinstance(m, (Linear, LayerNorm))]
    boundaries = [layer.boundary for layer in layers]
    for layer in layers:
        layer.boundary = None
    try:
        yield
    finally:
        for layer, boundary in zip(layers, boundaries, strict=True):
            layer.boundary = boundary
