"""AdamW as the paper runs it, and the running average of the weights."""

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, with the running variance limited by value before it is used.

    With v' = min(β₂ v + (1−β₂) g², limit) the limit also holds for the update that it enters. It is
    applied to v beforehand, which keeps the update itself fused: the bound below makes the sum come
    out at `limit` exactly, provided (1−β₂) g² itself stays below it, which clipping sees to: at the
    paper's numbers 0.04·4² = 0.64. Gradients whose squares all stay below the limit cannot exceed it, so the
    pass over the variances is left out for them.

    Args:
        plain: parameters whose gradient is the step already, but for the step size (`dalle.muon`).
        plain_decay: their weight decay.

    Source: paper, App. B.2 (variance clipped by value to 5 before either update).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        variance_limit: float | None = None,
        plain: Collection[str] = (),
        plain_decay: float = 0.0,
    ) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if len(full_shape(p)) > 1 and n not in plain]
        # Gains and biases are not decayed, nor are the prior's two start vectors.
        vectors = [p for _, p in named if len(full_shape(p)) <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        if plain:
            moved = [p for n, p in named if n in plain]
            groups.append({"params": moved, "weight_decay": plain_decay, "plain": True})
        # The step size is written into the groups before every update (see `Engine.update`).
        super().__init__(groups, lr=0.0, betas=betas, eps=1e-8, weight_decay=weight_decay, fused=True)
        self.variance_limit, self.grad_norm, self.skip = variance_limit, math.inf, False
        self.number = 0
        self.names = {id(p): n for n, p in named}
        self.packed: frozenset[str] = frozenset()  # names of parameters with 16-bit moments
        self.plain = frozenset(plain)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Apply update number `self.number`; `self.grad_norm` must be the gradient's norm, after clipping.

        With `skip` it leaves weights, moments and counts as they are.
        """
        if self.skip:
            return None
        self._limit_variance()
        with self.groups("plain") as plain:
            for group in plain:
                for p in group["params"]:
                    if p.grad is not None:
                        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(p.grad, alpha=-group["lr"])
        with self.groups("plain", False):
            return super().step(closure)

    @contextmanager
    def groups(self, mark: str, marked: bool = True) -> Iterator[list[dict[str, Any]]]:
        """Only the groups with this mark, or without it, stand in `param_groups`."""
        every = self.param_groups
        self.param_groups = [group for group in every if group.get(mark, False) == marked]
        try:
            yield self.param_groups
        finally:
            self.param_groups = every

    def _limit_variance(self) -> None:
        """Make room for this update's squared gradients."""
        limit = self.variance_limit
        if limit is None or self.grad_norm**2 <= limit:
            return
        for group in self.param_groups:
            beta2 = group["betas"][1]
            for p in group["params"]:
                if (state := self.state.get(p)) and p.grad is not None:
                    make_room(state["exp_avg_sq"], p.grad.float(), beta2, limit)

    def moments(self) -> dict[str, Tensor]:
        """Both running moments and the update counts by parameter name, to be saved."""
        held = {
            f"{self.names[id(p)]}/{kind}": value
            for p, state in self.state.items()
            for kind, value in state.items()
        }
        return dict(sorted(held.items()))  # the same order whether they were loaded or not

    def load_moments(self, saved: Iterable[tuple[str, Tensor]]) -> None:
        """Take back what `moments` gave. Parameters without saved moments start afresh."""
        owners = {self.names[id(p)]: p for group in self.param_groups for p in group["params"]}
        for key, value in saved:
            name, _, kind = key.rpartition("/")
            if (p := owners.get(name)) is not None:
                # The fused kernel walks through memory: the moments must lie as the parameter does,
                # channels_last too, though files hold them contiguous. It wants the count beside it.
                like = (
                    torch.empty_like(p.detach(), dtype=value.dtype)
                    if value.ndim
                    else torch.empty((), device=p.device)
                )
                self.state[p][kind] = like.copy_(value)


def make_room(variance: Tensor, gradient: Tensor, beta2: float, limit: float) -> None:
    """Lower the variance, in place, so that it stays within `limit` once this gradient has entered it."""
    room = (limit - (1 - beta2) * gradient.square()) / beta2
    torch.minimum(variance, room.clamp_min_(0), out=variance)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Its shape, also where this process holds a part of it (ZeRO-3)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def parameter_count(model: nn.Module) -> int:
    """How many numbers are trained, over all processes."""
    return sum(math.prod(full_shape(p)) for p in model.parameters())


class Average:
    """Exponential moving average of parameters, fp32.

    average ← d·average + (1−d)·weights, every `every` updates, where d grows to `decay` as
    (1+n)/(10+n) over the first copies: a short run is not dominated by its random start.

    Source: paper, App. A.2 (0.999 at every update) and B.2 (0.99 at every 25th).
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float, every: int) -> None:
        self.decay, self.every = decay, every
        self.weights = [p.detach().float().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], step: int) -> None:
        """Take in the weights after update number `step` (counted from 1)."""
        if step % self.every:
            return
        copies = step // self.every
        decay = min(self.decay, (1 + copies) / (10 + copies))
        pairs = [(average, p.detach()) for average, p in zip(self.weights, parameters, strict=True)]
        if wide := [(average, p) for average, p in pairs if p.dtype == torch.float32]:
            torch._foreach_lerp_([average for average, _ in wide], [p for _, p in wide], 1 - decay)
        for average, p in pairs:
            if p.dtype != torch.float32:  # never all of them in fp32 at a time
                average.lerp_(p.float(), 1 - decay)
