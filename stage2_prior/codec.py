"""The frozen dVAE, as far as stage 2 knows it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Codec:
    """What makes codes of pictures and pictures of codes."""

    image_size: int  # pixels per side
    grid: int  # codes per side
    vocab_size: int
    encode: Callable[[Tensor], Tensor]  # pixels in [0, 1] `b 3 h w` → codes `b grid grid`
    decode: Callable[[Tensor], Tensor]  # the inverse
    vectors: Tensor  # one for every code, alike for codes that decode alike, `vocab_size channels`
    fingerprint: str  # names the dVAE's weights
