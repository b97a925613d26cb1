"""From the encoder's logits to what the bound needs: a relaxed sample, the KL, the use of the codes.

These are the largest tensors of stage 1, and between the networks a step passes over them some twenty times.
Here a few rows at a time go all the way while a core's cache holds them, each thread with pictures of its
own, and the backward pass is written out.

Source: paper, §2.1 and App. A.2; the KL is that of the raw logits as a categorical (openai/DALL-E#26).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dalle.noise import Noise, uniform
from dalle.threads import Threads

# Log-probabilities at a time: what a core's cache holds; enough for a GPU.
AT_ONCE = {"cpu": 2**19, "cuda": 2**26}


class Posterior(NamedTuple):
    """What `posterior` returns; all but `log_q` can be differentiated."""

    log_q: Float[Tensor, "b n v"]  # normalised log-probabilities of the codes at every position
    relaxed: Float[Tensor, "b n v"]  # a sample on the simplex, see `relax`
    kl: Float[Tensor, "b n"]  # KL(q ‖ uniform) in nats
    mean: Float[Tensor, " v"]  # how often each code is expected to be chosen


def posterior(
    logits: Float[Tensor, "b n v"],
    tau: float,
    generators: Sequence[Noise],
    threads: Threads | None = None,
) -> Posterior:
    """The posterior that unnormalised log-probabilities describe, and one relaxed sample of it.

    Args:
        tau: temperature of the relaxation.
        generators: of the noise, one for each picture.
        threads: share out the pictures; the same sample and the same KL.
    """
    return Posterior(*_Posterior.apply(logits.contiguous(), tau, generators, threads or Threads(1)))


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
        uniform(generator, out=row)
    negative_gumbel = x.log_().neg_().log_()
    return torch.softmax(torch.sub(log_q, negative_gumbel, out=x).div_(tau), -1, out=x)


def kl_to_uniform(log_q: Float[Tensor, "*n v"], q: Float[Tensor, "*n v"]) -> Float[Tensor, "*n"]:
    """KL(q ‖ uniform) in nats of normalised probabilities and their logarithms. Between 0 and ln v."""
    return torch.linalg.vecdot(q, log_q) + math.log(q.shape[-1])


class _Posterior(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tau: float, generators: Any, threads: Threads
    ) -> tuple[Tensor, ...]:
        log_q, relaxed = torch.empty_like(logits), torch.empty_like(logits)
        kl = logits.new_empty(logits.shape[:2])

        def run(pictures: range) -> Tensor:
            used = logits.new_zeros(logits.shape[-1])
            for rows in _rows(logits, pictures):
                torch.log_softmax(logits[rows], -1, out=log_q[rows])
                relax(log_q[rows], tau, generators[rows[0]], out=relaxed[rows])
                q = _exp(log_q[rows])
                kl[rows] = kl_to_uniform(log_q[rows], q)
                used += q.sum((0, 1))
            return used

        used = threads.map(run, _shares(len(logits), threads))
        ctx.save_for_backward(log_q, relaxed)
        ctx.mark_non_differentiable(log_q)
        ctx.set_materialize_grads(False)  # zeros for log_q would be as large as it is
        ctx.tau, ctx.threads = tau, threads
        return log_q, relaxed, kl, torch.stack(used).sum(0) / kl.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        log_q, relaxed = ctx.saved_tensors
        _, of_relaxed, of_kl, of_mean = grads
        grad = torch.empty_like(log_q)
        through_softmax = torch.ops.aten._softmax_backward_data  # p, dp -> p (dp - Σ p dp)
        of_kl = log_q.new_zeros(log_q.shape[:2]) if of_kl is None else of_kl
        of_mean = log_q.new_zeros(log_q.shape[2]) if of_mean is None else of_mean / of_kl.numel()

        def run(pictures: range) -> None:
            for rows in _rows(log_q, pictures):
                # d(Σ q ln q)/dq is ln q + 1, and the 1 falls out.
                of_q = torch.addcmul(of_mean, log_q[rows], of_kl[rows][..., None])
                grad[rows] = through_softmax(of_q, _exp(log_q[rows]), -1, grad.dtype)
                if of_relaxed is not None:  # as if log_q were the logits: normalising changes neither softmax
                    sample = through_softmax(of_relaxed[rows], relaxed[rows], -1, grad.dtype)
                    grad[rows].add_(sample, alpha=1 / ctx.tau)

        ctx.threads.map(run, _shares(len(grad), ctx.threads))
        return grad, None, None, None


def _exp(log_q: Tensor) -> Tensor:
    """Without underflow, over which MKL takes thirty times as long, and sharp posteriors have little else."""
    return log_q.clamp_min(-80).exp_()


def _shares(pictures: int, threads: Threads) -> list[range]:
    """Which pictures are whose."""
    size = -(-pictures // threads.count)
    return [range(at, min(at + size, pictures)) for at in range(0, pictures, size)]


def _rows(x: Float[Tensor, "b n v"], pictures: range) -> Iterator[tuple[slice, slice]]:
    """Where in x the next few lie: some pictures, or where one alone is too large, some rows of it."""
    _, n, v = x.shape
    at_once = AT_ONCE[x.device.type]
    together, rows = max(1, at_once // (n * v)), min(n, max(1, at_once // v))
    for picture in range(pictures.start, pictures.stop, together):
        for row in range(0, n, rows):
            yield slice(picture, min(picture + together, pictures.stop)), slice(row, row + rows)
