"""One gradient scale for every resblock, adapted after every update.

fp16 reaches from 2⁻²⁴ to 2¹⁶. The gradients of a deep transformer span more, and fall from the first resblock
to the last: under one scale for all of them either the first overflow or the last become 0. So each resblock
has a scale that follows its own gradients: it grows a little after every update in which they were finite,
and shrinks, at most once in a while, when they were not. Such an update is dropped as a whole.

The paper divides the loss by the number of replicas M and multiplies the scales by M to make up for it. Here
the gradient of a process is that of its own micro-batches' mean, so the scales are the paper's divided by M,
and a run may go on with another number of processes.

Source: paper, App. D.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, cast

import torch
import torch.distributed
from torch import Tensor, nn

from dalle.boundary import Boundary, enclose

START = 2.0**13
LOWEST, HIGHEST = 2.0**7, 2.0**24
GROWTH = 2 ** (1 / 1000)
SHRINKING = 2**-0.5
REST = 125  # updates between two divisions of the same scale, at least


class Rule:
    """The scales of n resblocks and how they follow what is seen of the gradients."""

    def __init__(self, n: int) -> None:
        self.scales = [START] * n
        self.rest = [0] * n  # updates to come in which the scale may not be divided
        self.overflows = [0] * n  # updates in which the gradient was not finite, since the start

    def adapt(self, overflowed: Sequence[bool]) -> None:
        """Take in which resblocks' parameter gradients were not finite in this update."""
        for i, bad in enumerate(overflowed):
            self.rest[i] = max(0, self.rest[i] - 1)
            self.overflows[i] += bad
            if not bad:
                factor = GROWTH
            elif self.rest[i] == 0:
                factor, self.rest[i] = SHRINKING, REST
            else:
                factor = 1.0
            self.scales[i] = min(max(self.scales[i] * factor, LOWEST), HIGHEST)


class Resblocks(Protocol):
    """What a model must tell to be scaled: its resblocks by name, each as the modules of its branch."""

    def resblocks(self) -> Mapping[str, Sequence[nn.Module]]:
        """In the order of the forward pass."""


class Scaling:
    """Lets the resblocks of a model run in 16 bits, and adapts their gradient scales.

    After the last backward pass of every update the engine calls `update` with the gradients that it
    holds, and drops the update if that says so.

    Args:
        model: has `resblocks()`.
        micro_batches: what the loss is divided by before the backward pass; the scales make up for it.
        dtype: of the matrix products; another one than fp16 shows what does not depend on it.
    """

    def __init__(self, model: nn.Module, micro_batches: int = 1, dtype: torch.dtype = torch.float16) -> None:
        resblocks = cast(Resblocks, model).resblocks()
        self.names = list(resblocks)
        self.rule = Rule(len(self.names))
        self.micro_batches = micro_batches
        self.overflowed: list[str] = []  # resblocks whose gradient was not finite in the last update
        self.outside = False  # whether any other parameter's was not
        device = next(model.parameters()).device
        self._applied = torch.empty(len(self.names), device=device)
        self.apply()
        owner: dict[int, int] = {}
        for i, modules in enumerate(resblocks.values()):
            boundary = Boundary(self._applied[i], dtype)
            for module in modules:
                enclose(module, boundary)
                owner |= {id(p): i for p in module.parameters()}
        # Everything outside of the resblocks counts as one more, which has no scale.
        self._owner = {n: owner.get(id(p), len(self.names)) for n, p in model.named_parameters()}
        self._places: dict[tuple[str, ...], Tensor] = {}

    def update(self, gradients: Iterable[tuple[str, Tensor]]) -> bool:
        """Look through the gradients of one update and adapt the scales; whether it must be dropped.

        Args:
            gradients: names of parameters, and what this process holds of their gradients, in fp32 and
                before any clipping. All of it is looked at in one pass and, where several processes train,
                agreed on in one exchange among them all; the answer is waited for once.
        """
        flags = self._applied.new_zeros(len(self.names) + 1)
        if held := list(gradients):
            owners = self._owners(tuple(name for name, _ in held))
            norms = torch.stack(torch._foreach_norm([piece for _, piece in held]))  # shows what is not finite
            flags.index_add_(0, owners, (~norms.isfinite()).to(flags))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        *within, outside = (count > 0 for count in flags.tolist())
        self.rule.adapt(within)
        self.apply()
        self.overflowed = [name for name, bad in zip(self.names, within, strict=True) if bad]
        self.outside = outside
        return outside or any(within)

    def _owners(self, names: tuple[str, ...]) -> Tensor:
        """The places of these parameters' resblocks; kept on the device, for they seldom change."""
        if names not in self._places:
            places = [self._owner[name] for name in names]
            self._places = {names: torch.tensor(places, device=self._applied.device)}
        return self._places[names]

    @property
    def mendable(self) -> bool:
        """Whether smaller scales may mend what the last update suffered from."""
        scales = dict(zip(self.names, self.rule.scales, strict=True))
        return not self.outside and all(scales[name] > LOWEST for name in self.overflowed)

    def describe_overflow(self) -> str:
        """The resblocks whose gradients were not finite in the last update, in words."""
        scales = dict(zip(self.names, self.rule.scales, strict=True))
        first, more = self.overflowed[0], len(self.overflowed) - 1
        others = f" and {more} more" if more else ""
        return f"resblock {first}{others}, whose scale is 2^{math.log2(scales[first]):.1f}"

    def apply(self) -> None:
        """Let the boundaries have the rule's scales."""
        self._applied.copy_(torch.tensor(self.rule.scales) * self.micro_batches, non_blocking=True)

    def metrics(self) -> dict[str, list[float]]:
        """For the log: of every resblock log₂ of its scale, and how often its gradient overflowed so far."""
        return {
            "log2_scales": [math.log2(scale) for scale in self.rule.scales],
            "overflows": [float(n) for n in self.rule.overflows],
        }

    def tensors(self) -> dict[str, Tensor]:
        """All that resuming needs."""
        return {
            "scales": torch.tensor(self.rule.scales, dtype=torch.float64),
            "rest": torch.tensor(self.rule.rest),
            "overflows": torch.tensor(self.rule.overflows),
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        self.rule.scales = saved["scales"].tolist()
        self.rule.rest = saved["rest"].tolist()
        self.rule.overflows = saved["overflows"].tolist()
        self.apply()
