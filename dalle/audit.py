"""Which gradients fp16 would lose: measured in fp32, resblock by resblock.

Of every resblock the gradients are counted by their octave where fp16 would hold them: at both ends of its
branch, and of its weight matrices. From the counts follows, for any scale, how many of them would become
0, how many denormal (they lose bits), and how many would overflow; to the octave.

Source: paper, App. D (why each resblock has a gradient scale).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dalle.scaling import HIGHEST, LOWEST

# Octave e holds magnitudes from 2^e to 2^(e+1). fp32 has these; what is not finite goes into one above.
LEAST, MOST = -150, 128
TO_ZERO, NORMAL, BEYOND = (
    -25,
    -14,
    16,
)  # fp16: 0 below the first, denormal below the second, Inf from the last


@dataclass(frozen=True)
class Loss:
    """Shares of the gradients that are not 0 in fp32."""

    zero: float
    denormal: float
    overflow: float


@dataclass
class Octaves:
    """How many gradients there are of each magnitude."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(MOST - LEAST + 1, dtype=torch.int64))

    def add(self, grad: Tensor) -> None:
        """Count these in; zeros are left out."""
        values = grad.detach().float().flatten()
        values = values[values != 0]
        octaves = torch.where(values.isfinite(), torch.frexp(values).exponent - 1, MOST)
        self.counts += torch.bincount((octaves - LEAST).cpu(), minlength=len(self.counts))

    @property
    def largest(self) -> int | None:
        """The highest octave in which there are any."""
        found = self.counts.nonzero()
        return int(found[-1]) + LEAST if len(found) else None

    @property
    def median(self) -> int | None:
        """The octave of the gradient in the middle."""
        total = int(self.counts.sum())
        return int((self.counts.cumsum(0) * 2 >= total).nonzero()[0]) + LEAST if total else None

    def lost(self, log2_scale: int) -> Loss:
        """What fp16 loses of them at this scale."""
        octaves = torch.arange(LEAST, MOST + 1) + log2_scale
        total = max(1, int(self.counts.sum()))
        zero, small = octaves < TO_ZERO, (octaves >= TO_ZERO) & (octaves < NORMAL)
        shares = (int(self.counts[which].sum()) / total for which in (zero, small, octaves >= BEYOND))
        return Loss(*shares)


@dataclass
class Resblock:
    """The gradients of one resblock."""

    activations: Octaves = field(default_factory=Octaves)
    weights: Octaves = field(default_factory=Octaves)

    @property
    def largest(self) -> int | None:
        """The highest octave of both."""
        found = [kind.largest for kind in (self.activations, self.weights) if kind.largest is not None]
        return max(found, default=None)

    def fitting(self) -> int:
        """log₂ of the largest scale under which nothing overflows."""
        return BEYOND - 1 - (self.largest or 0)


def count(
    resblocks: Mapping[str, Sequence[nn.Module]], losses: Iterable[Callable[[], Tensor]]
) -> dict[str, Resblock]:
    """Run backward passes in fp32 and count the gradients of every resblock.

    Args:
        resblocks: by name; the last module of each is its branch (see `dalle.scaling.Resblocks`).
        losses: each computes the loss of one batch.
    """
    found = {name: Resblock() for name in resblocks}
    with ExitStack() as hooks:
        for name, modules in resblocks.items():
            for module in modules:
                hooks.enter_context(_watched(module, found[name].activations))
        for loss in losses:
            loss().backward()
            for name, modules in resblocks.items():
                for p in (p for module in modules for p in module.parameters()):
                    if p.ndim > 1 and p.grad is not None:
                        found[name].weights.add(p.grad)
                    p.grad = None
    return found


@contextmanager
def _watched(module: nn.Module, octaves: Octaves) -> Iterator[None]:
    """Count the gradients of what `module` returns."""

    def watch(_: nn.Module, __: Any, output: Tensor) -> None:
        output.register_hook(octaves.add)

    handle = module.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def facts(found: Mapping[str, Resblock]) -> dict[str, Any]:
    """What `dalle audit-precision` says, for machines: under one scale for all, and under its own."""
    together = min(resblock.fitting() for resblock in found.values())
    return {
        "one_log2_scale": together,
        "resblocks": {
            name: {
                "log2_largest": resblock.largest,
                "log2_median": resblock.activations.median,
                "one_scale": _under(resblock, together),
                "own_scale": _under(resblock, own_scale(resblock)),
            }
            for name, resblock in found.items()
        },
    }


def own_scale(resblock: Resblock) -> int:
    """log₂ of the scale that the resblock would come to have, within the paper's limits."""
    return int(min(max(resblock.fitting(), math.log2(LOWEST)), math.log2(HIGHEST)))


def _under(resblock: Resblock, log2_scale: int) -> dict[str, Any]:
    return {
        "log2_scale": log2_scale,
        "activations": asdict(resblock.activations.lost(log2_scale)),
        "weights": asdict(resblock.weights.lost(log2_scale)),
    }


def describe(facts: Mapping[str, Any]) -> str:
    """The same as a table."""
    one = f"one scale, 2^{facts['one_log2_scale']}"
    lines = [
        f"{facts['run']}: gradients of {facts['pictures']:,} pictures in fp32, by octave (-3: 1/8 to 1/4);",
        "shares that fp16 would lose to 0 or Inf, in brackets those that it would keep with fewer bits",
        "",
        f"{'':22}{'octave':>18}{one:>28}{'own scale':>40}",
        f"{'resblock':22}{'largest':>9}{'median':>9}" + f"{'scale':>8}{'activations':>16}{'weights':>16}" * 2,
    ]
    for name, found in facts["resblocks"].items():
        size = (found["log2_largest"], found["log2_median"])
        octaves = "".join(f"{'none' if octave is None else octave:>9}" for octave in size)
        lines.append(f"{name:22}{octaves}{_columns(found['one_scale'])}{_columns(found['own_scale'])}")
    return "\n".join(lines)


def _columns(under: Mapping[str, Any]) -> str:
    lost = (under["activations"], under["weights"])
    shares = (f"{loss['zero'] + loss['overflow']:.1%} ({loss['denormal']:.1%})" for loss in lost)
    return f"{'2^' + str(under['log2_scale']):>8}" + "".join(f"{share:>16}" for share in shares)
