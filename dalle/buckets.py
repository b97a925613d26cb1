"""Gradients averaged over processes while the backward pass that makes them goes on.

A backward pass comes to the parameters in about the reverse of their order. As soon as all gradients of one
bucket are there, they are sent together, and the pass goes on below them. The values are those of averaging
after the pass.

Source: paper, App. E (the exchange of one resblock runs beside the backward pass of others).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle.piece import gradient_of

BUCKET = 25 * 2**20  # bytes of gradients that are sent together


class Buckets:
    """The parameters of a model in the order in which their gradients are averaged.

    Args:
        parameters: in the order of the forward pass; all processes have the same.
        group: the processes; by default all.
        size: bytes of a bucket, at most, where it holds more than one gradient.
    """

    def __init__(self, parameters: Sequence[Tensor], group: Any = None, size: int = BUCKET) -> None:
        self.group, self.world = group, dist.get_world_size(group)
        self.buckets: list[list[Tensor]] = [[]]
        for p in reversed(parameters):
            if self.buckets[-1] and 4 * sum(q.numel() for q in [*self.buckets[-1], p]) > size:
                self.buckets.append([])
            self.buckets[-1].append(p)
        self._place = {id(p): i for i, bucket in enumerate(self.buckets) for p in bucket}
        self._missing: list[int] = []  # gradients that each bucket waits for; empty while none is awaited
        self._sent: list[tuple[list[Tensor], Tensor, Any]] = []
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._arrived)

    def expect(self) -> None:
        """Send the gradients of the next backward pass, the last one of an update, as they come."""
        self._missing, self._sent = [len(bucket) for bucket in self.buckets], []

    def finish(self) -> None:
        """Send what was not sent, and replace all gradients by their means."""
        while len(self._sent) < len(self.buckets):
            self._send()
        self._missing = []
        for gradients, flat, handle in self._sent:
            handle.wait()
            parts = flat.split([g.numel() for g in gradients])
            if gradients:
                shaped = [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)]
                torch._foreach_copy_(gradients, shaped)
        self._sent = []

    def _arrived(self, p: Tensor) -> None:
        if not self._missing:
            return
        self._missing[self._place[id(p)]] -= 1
        # In their order, whatever the pass made of it: every process has to send the same.
        while len(self._sent) < len(self.buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self._sent)]
        gradients = [gradient for p in bucket if (gradient := gradient_of(p)) is not None]
        flat = torch.cat([g.flatten() for g in gradients] or [bucket[0].new_empty(0, dtype=torch.float32)])
        flat /= self.world
        self._sent.append((gradients, flat, dist.all_reduce(flat, group=self.group, async_op=True)))
