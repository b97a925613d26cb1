"""Gradients exchanged between processes while the backward pass that makes them goes on.

A backward pass comes to the parameters in about the reverse of their order. As soon as all gradients of one
bucket are there, work on them begins, and the pass goes on below them. The values are those of an exchange
after the pass.

Source: paper, App. E (the exchange of one resblock runs beside the backward pass of others).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle.overlap import BLOCK, InTurn, Work, blocks
from dalle.piece import gradient_of

Exchange = Callable[[Sequence[nn.Parameter]], Work[None]]  # of the gradients of some parameters


class Buckets:
    """The parameters of a model in the order in which their gradients are exchanged.

    Args:
        parameters: in the order of the forward pass; all processes have the same.
        exchange: what is done with the gradients of a bucket.
        size: bytes of a bucket, at most, where it holds more than one gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], exchange: Exchange, size: int = BLOCK) -> None:
        self.exchange = exchange
        self.buckets = blocks(reversed(parameters), lambda p: 4 * p.numel(), size)
        self._place = {id(p): i for i, bucket in enumerate(self.buckets) for p in bucket}
        self._missing: list[int] = []  # gradients that each bucket waits for; empty while none is awaited
        self._begun = 0
        self._in_turn = InTurn()
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._arrived)

    def expect(self) -> None:
        """Exchange the gradients of the next backward pass, the last one of an update, as they come."""
        self._missing = [len(bucket) for bucket in self.buckets]

    def finish(self) -> None:
        """Exchange what has not been, and wait for all of it."""
        while self._begun < len(self.buckets):
            self._begin()
        self._in_turn.finish()
        self._missing, self._begun = [], 0

    def _arrived(self, p: Tensor) -> None:
        if not self._missing:
            return
        self._missing[self._place[id(p)]] -= 1
        # In their order, whatever the pass made of it: every process has to send the same.
        while self._begun < len(self.buckets) and self._missing[self._begun] == 0:
            self._begin()

    def _begin(self) -> None:
        bucket = self.buckets[self._begun]
        self._begun += 1
        self._in_turn.begin(self.exchange(bucket))


def average_gradients(parameters: Sequence[nn.Parameter], group: Any = None) -> Work[None]:
    """Replace gradients by their means over the processes of a group, by default all."""
    gradients = [gradient for p in parameters if (gradient := gradient_of(p)) is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat /= dist.get_world_size(group)
    sent = dist.all_reduce(flat, group=group, async_op=True)
    yield
    sent.wait()
    parts = flat.split([gradient.numel() for gradient in gradients])
    shaped = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
    torch._foreach_copy_(gradients, shaped)
