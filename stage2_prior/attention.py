"""Self-attention under the three masks, over whole sequences. Drawing has its own form: `decode.py`."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from dalle.boundary import Linear
from stage2_prior.config import PriorConfig
from stage2_prior.masks import Kind, dense


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
