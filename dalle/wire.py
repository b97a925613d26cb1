"""Means between machines, in fp32 or with 1-6-9 on the wire, and how many bytes they take."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dalle.minifloat import SIGNED
from dalle.overlap import Work


class Wire:
    """The processes of the same ordinal on all machines; this one alone where there is no group.

    `bytes` counts the buffers that are handed over for means, whatever the transport makes of them; a plain
    mean of gradients would be counted in the same way.
    """

    def __init__(self, group: Any) -> None:
        self.group, self.bytes = group, 0
        self.machines = 1 if group is None else dist.get_world_size(group)

    def mean(self, tensors: Sequence[Tensor], *, packed: bool = False) -> Work[list[Tensor]]:
        """The means over all machines, sent together; everybody receives the same bits.

        With `packed` they travel in 1-6-9: rounded before they are sent and after they are averaged, each
        part of them by one process. What is not finite then counts as the largest value.
        """
        if not tensors:
            return []
        flat = torch.cat([t.reshape(-1) for t in tensors])
        self.bytes += flat.numel() * (2 if packed else 4)
        flat = yield from self._packed_mean(flat) if packed else self._plain_mean(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def _plain_mean(self, flat: Tensor) -> Work[Tensor]:
        sent = dist.all_reduce(flat, group=self.group, async_op=True)
        yield
        sent.wait()
        return flat.div_(self.machines)

    def _packed_mean(self, flat: Tensor) -> Work[Tensor]:
        share = math.ceil(flat.numel() / self.machines)
        padded = flat.new_zeros(self.machines * share)
        padded[: flat.numel()] = flat
        mine = SIGNED.pack(padded).view(torch.uint8)  # no transport knows uint16
        received = torch.empty_like(mine)
        sent = dist.all_to_all_single(received, mine, group=self.group, async_op=True)
        yield
        sent.wait()
        mean = SIGNED.unpack(received.view(torch.uint16)).view(self.machines, share).mean(0)
        mine = SIGNED.pack(mean).view(torch.uint8)
        sent = dist.all_gather_into_tensor(received, mine, group=self.group, async_op=True)
        yield
        sent.wait()
        return SIGNED.unpack(received.view(torch.uint16))[: flat.numel()]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all machines. Not counted: it belongs to no update."""
        total = tensor.clone()
        if self.machines > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def most(self, number: Tensor) -> Tensor:
        """The largest on any machine."""
        largest = number.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def any(self, flags: Tensor) -> Tensor:
        """Which flags are up on any machine. Not counted: a byte for each matrix."""
        return self.most(flags.to(torch.uint8)) > 0

    def same(self, tensors: Iterable[Tensor]) -> bool:
        """Do all machines hold the same bits?"""
        if self.machines == 1:
            return True
        digest, device = hashlib.sha256(), torch.device("cpu")
        for tensor in tensors:
            device = tensor.device
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        mine = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=device)
        highest, lowest = mine.clone(), mine
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self.group)
        return torch.equal(highest, lowest)
