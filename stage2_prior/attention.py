"""Self-attention under the three masks, over whole sequences. Drawing has its own form: `decode.py`."""

from jaxtyping import Float
from torch import Tensor, nn

from dalle.boundary import Linear
from stage2_prior.backends import Attend, Dense
from stage2_prior.config import PriorConfig
from stage2_prior.masks import Kind


class Attention(nn.Module):
    """Multi-head self-attention; one softmax over all the keys that the layer's mask allows.

    Source: paper, §2.2 and App. B.1.
    """

    def __init__(self, config: PriorConfig, kind: Kind) -> None:
        super().__init__()
        self.config, self.kind, self.heads = config, kind, config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.attend: Attend = Dense(config, kind)

    def forward(self, x: Float[Tensor, "b t w"]) -> Float[Tensor, "b t w"]:
        """Attend within the first t slots; t is the whole sequence, or shorter at its end."""
        return self.out(self.attend(self.qkv(x), self.heads))
