"""What drawing remembers of the slots before: of each layer only what a later slot can still see.

The text's keys and values serve all pictures of its prompt. Of the picture a layer keeps the last slots that
any later slot of its mask reaches, in a ring: grid + 1 of them in a row layer, the last rows in a
convolutional one. What a slot reads has the same size at every position, and so does its cost.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import no_type_check

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stage2_prior.masks import Kind, visible


@no_type_check
class Window(nn.Module):
    """What each image slot of one kind of layer reads: places in a ring of the last slots.

    Args:
        ring: how many slots are kept; slot i lies at place i mod ring.
        places: `cells seen`, to be read for every slot; None where it is always the whole ring, in its order.
        bias: `cells seen`, 0 for a place that the slot sees, −∞ for one that it does not.
    """

    def __init__(self, ring: int, places: Tensor | None, bias: Tensor) -> None:
        super().__init__()
        self.ring, self.places, self.bias = ring, places, bias

    @classmethod
    def of(cls, kind: Kind, grid: int, kernel: int, device: torch.device) -> "Window":
        """The window of a mask, found from its definition."""
        slots = torch.arange(grid**2)[:, None]
        seen = pad_sequence(visible(kind, grid, kernel), batch_first=True, padding_value=-1)
        hidden = seen < 0
        seen = torch.where(hidden, slots, seen)  # itself once more, hidden by the bias
        ring = int((slots - seen).max()) + 1
        places = seen % ring
        if seen.shape[1] < ring:
            bias = torch.zeros(seen.shape).masked_fill(hidden, -torch.inf)
            return cls(ring, places.to(device), bias.to(device))
        bias = torch.full((grid**2, ring), -torch.inf).scatter(1, places, 0.0)
        return cls(ring, None, bias.to(device))

    def forward(self, slot: Tensor, own: Tensor) -> tuple[Tensor, Tensor | None]:
        """Let the mask show what this slot sees; where the slot is written, and what is read of the ring."""
        own.copy_(self.bias.index_select(0, slot))
        places = self.places
        return slot % self.ring, None if places is None else places.index_select(0, slot).view(-1)


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer for p prompts × n pictures.

    All pictures of a prompt attend in one product to its text and to the windows of all of them; a mask
    leaves each its own window. Keys and values are that product's operands, in one memory. The ring is a part
    of it where a slot sees all of the ring, otherwise it lies beside it.
    """

    keys: Float[Tensor, "p h slots d"]
    values: Float[Tensor, "p h slots d"]
    windows: Float[Tensor, "seen p n two h d"]  # the end of both
    ring: Float[Tensor, "ring p n two h d"]

    @classmethod
    def of(cls, text: Float[Tensor, "two p h text d"], window: Window, pictures: int) -> "Cache":
        """Room for so many pictures of each prompt, before their first slot."""
        seen = window.bias.shape[1]
        _, p, h, t, d = text.shape
        read = text.new_zeros(2, p, h, t + pictures * seen, d)
        read[:, :, :, :t] = text
        windows = rearrange(read[:, :, :, t:], "two p h (n seen) d -> seen p n two h d", n=pictures)
        apart = window.places is not None
        ring = text.new_zeros(window.ring, p, pictures, 2, h, d) if apart else windows
        return cls(read[0], read[1], windows, ring)


@dataclass(frozen=True)
class State:
    """A cache for every layer, and for every kind of layer a mask, whose moving part is a view of it."""

    caches: list[Cache]
    masks: list[Tensor]  # n slots
    own: list[Tensor]  # n seen: of each mask what every picture's own window is under

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All of them, kind by kind and then layer by layer, as `Step` takes them."""
        of_kinds = [x for kind in zip(self.masks, self.own, strict=True) for x in kind]
        return of_kinds + [x for c in self.caches for x in (c.keys, c.values, c.windows, c.ring)]

    @property
    def bytes(self) -> int:
        """Memory of the keys and values; a view counts once."""
        kept = (x for c in self.caches for x in (c.keys, c.values, c.ring))
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}.values())
