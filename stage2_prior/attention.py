"""Self-attention under the three masks: over whole sequences, and one image slot at a time."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dalle.boundary import Linear
from stage2_prior.config import PriorConfig
from stage2_prior.masks import Kind, dense, visible


@dataclass
class Cache:
    """Keys and values of one layer while drawing: of each prompt's text once, of each picture's slots."""

    text_keys: Float[Tensor, "p h text d"]
    text_values: Float[Tensor, "p h text d"]
    keys: Float[Tensor, "b h cells d"]  # p prompts × n pictures each; filled up to the current slot
    values: Float[Tensor, "b h cells d"]


class Attention(nn.Module):
    """Multi-head self-attention; one softmax over all the keys that the layer's mask allows.

    Source: paper, §2.2 and App. B.1.
    """

    def __init__(self, config: PriorConfig, kind: Kind) -> None:
        super().__init__()
        self.config, self.kind, self.heads = config, kind, config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self._masks: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, x: Float[Tensor, "b t w"]) -> Float[Tensor, "b t w"]:
        """Attend within the first t slots; t is the whole sequence, or shorter at its end."""
        q, k, v = self._split(x)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(x.shape[1], x.device))
        return self.out(rearrange(y, "b h t d -> b t (h d)"))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        return q, k, v

    def _mask(self, length: int, device: torch.device) -> Tensor:
        key = (length, device)
        if key not in self._masks:
            c = self.config
            mask = dense(self.kind, c.text_length, c.grid, c.kernel)[:length, :length]
            self._masks = {key: mask.to(device)}
        return self._masks[key]

    def prefill(self, x: Float[Tensor, "p text w"], pictures: int) -> tuple[Float[Tensor, "p text w"], Cache]:
        """Attend within the text of p prompts; room in the cache for so many pictures of each."""
        q, k, v = self._split(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        p, h, _, d = k.shape
        room = k.new_zeros(2, p * pictures, h, self.config.cells, d)
        return self.out(rearrange(y, "p h t d -> p t (h d)")), Cache(k, v, room[0], room[1])

    def step(self, x: Float[Tensor, "b w"], cache: Cache, slot: int) -> Float[Tensor, "b w"]:
        """Attend from image slot `slot` of b pictures to what its mask allows; their keys join the cache.

        The text's keys are shared by all pictures of a prompt, so they are read once per prompt.
        """
        q, k, v = rearrange(self.qkv(x), "b (three h d) -> three b h d", three=3, h=self.heads)
        cache.keys[:, :, slot], cache.values[:, :, slot] = k, v
        seen = visible(self.kind, self.config.grid, self.config.kernel)[slot].to(x.device)
        keys, values = cache.keys[:, :, seen], cache.values[:, :, seen]

        prompts = len(cache.text_keys)
        by_prompt = rearrange(q, "(p n) h d -> p h n d", p=prompts) / math.sqrt(q.shape[-1])
        to_text = rearrange(by_prompt @ cache.text_keys.transpose(-1, -2), "p h n t -> (p n) h t")
        to_image = (keys @ q[..., None]).squeeze(-1) / math.sqrt(q.shape[-1])
        weights = torch.softmax(torch.cat([to_text, to_image], -1).float(), -1).to(v.dtype)
        from_text, from_image = weights.split([to_text.shape[-1], len(seen)], -1)
        y = rearrange(
            rearrange(from_text, "(p n) h t -> p h n t", p=prompts) @ cache.text_values,
            "p h n d -> (p n) h d",
        )
        y = y + (from_image[:, :, None] @ values).squeeze(2)
        return self.out(rearrange(y, "b h d -> b (h d)"))
