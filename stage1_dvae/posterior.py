"""From the encoder's logits to what the bound needs: a relaxed sample, the KL, the use of the codes.

These are the largest tensors of stage 1, and between the networks a step passes over them some twenty times.
Here a few rows at a time go all the way while a core's cache holds them, and the backward pass is written
out.

Source: paper, §2.1 and App. A.2; the KL is that of the raw logits as a categorical (openai/DALL-E#26).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dalle.noise import Noise, negative_gumbel

# Log-probabilities at a time: what a core's cache holds; enough for a GPU.
AT_ONCE = {"cpu": 2**19, "cuda": 2**26}


class Posterior(NamedTuple):
    """What `posterior` returns."""

    relaxed: Float[Tensor, "b n v"]  # a sample on the simplex, see `relax`
    kl: Float[Tensor, "b n"]  # KL(q ‖ uniform) in nats
    mean: Float[Tensor, "b v"]  # how often each code is expected to be chosen in a picture


def posterior(logits: Float[Tensor, "b n v"], tau: float, generators: Sequence[Noise]) -> Posterior:
    """The posterior that unnormalised log-probabilities describe, and one relaxed sample of it.

    Args:
        tau: temperature of the relaxation.
        generators: of the noise, one for each picture.
    """
    return Posterior(*_Posterior.apply(logits.contiguous(), tau, generators))


def relax(
    log_q: Float[Tensor, "b n v"],
    tau: float,
    generators: Sequence[Noise],
    out: Float[Tensor, "b n v"] | None = None,
) -> Float[Tensor, "b n v"]:
    """A sample of the Gumbel-softmax relaxation, softmax((log q + Gumbel noise) / τ), over the last axis.

    Each picture's noise comes from a generator of its own, so that it does not depend on the others.
    """
    x = torch.empty_like(log_q, memory_format=torch.contiguous_format) if out is None else out
    for row, generator in zip(x, generators, strict=True):
        negative_gumbel(generator, out=row)
    return torch.softmax(torch.sub(log_q, x, out=x).div_(tau), -1, out=x)


def kl_to_uniform(log_q: Float[Tensor, "*n v"], q: Float[Tensor, "*n v"]) -> Float[Tensor, "*n"]:
    """KL(q ‖ uniform) in nats of normalised probabilities and their logarithms. Between 0 and ln v."""
    return (q * log_q).sum(-1) + math.log(q.shape[-1])


class _Posterior(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tau: float, generators: Sequence[Noise]) -> tuple[Tensor, ...]:
        (pictures, n, v), relaxed = logits.shape, torch.empty_like(logits)
        kl, mean = logits.new_empty(pictures, n), logits.new_zeros(pictures, v)
        for some, rows in _pieces(logits):
            log_q = torch.log_softmax(logits[some, rows], -1)
            relax(log_q, tau, generators[some], out=relaxed[some, rows])
            q = torch.softmax(logits[some, rows], -1)  # in less time than exp(log q) takes
            mean[some] += q.sum(1)
            kl[some, rows] = kl_to_uniform(log_q, q)
        ctx.save_for_backward(logits, relaxed)
        ctx.set_materialize_grads(False)
        ctx.tau = tau
        return relaxed, kl, mean / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, relaxed = ctx.saved_tensors
        (pictures, n, v), grad = logits.shape, torch.empty_like(logits)
        of_relaxed, of_kl, of_mean = grads
        through_softmax = torch.ops.aten._softmax_backward_data  # dp, p -> p (dp - Σ p dp)
        of_kl = logits.new_zeros(pictures, n) if of_kl is None else of_kl
        of_mean = logits.new_zeros(pictures, v) if of_mean is None else of_mean / n
        for some, rows in _pieces(logits):
            here = logits[some, rows]
            # d(Σ q ln q)/dq is ln q + 1; what all codes share falls out, so that logits do for ln q.
            of_q = torch.addcmul(of_mean[some, None], here, of_kl[some, rows, None])
            of_here = through_softmax(of_q, torch.softmax(here, -1), -1, grad.dtype)
            if of_relaxed is not None:
                sample = through_softmax(of_relaxed[some, rows], relaxed[some, rows], -1, grad.dtype)
                of_here.add_(sample, alpha=1 / ctx.tau)
            grad[some, rows] = of_here
        return grad, None, None


def _pieces(x: Float[Tensor, "b n v"]) -> Iterator[tuple[slice, slice]]:
    """Where in x the next few rows lie: all of some pictures, or some of one that is too large."""
    pictures, n, v = x.shape
    at_once = AT_ONCE[x.device.type]
    together, rows = max(1, at_once // (n * v)), min(n, max(1, at_once // v))
    for picture in range(0, pictures, together):
        for row in range(0, n, rows):
            yield slice(picture, picture + together), slice(row, row + rows)
