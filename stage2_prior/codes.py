"""The frozen dVAE, as far as this stage knows it."""

from collections.abc import Callable

from torch import Tensor


class Codes:
    """The frozen dVAE as this stage sees it.

    Args:
        image_size: pixels per side.
        grid: codes per side.
        vocab_size: number of codes.
        encode: pixels in [0, 1] `b 3 h w` → codes `b grid grid`.
        decode: the inverse.
        vectors: one for every code, alike for codes that decode alike, `vocab_size channels`.
        fingerprint: names the dVAE's weights.
    """

    def __init__(
        self,
        image_size: int,
        grid: int,
        vocab_size: int,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        vectors: Tensor,
        fingerprint: str,
    ) -> None:
        self.image_size, self.grid, self.vocab_size = image_size, grid, vocab_size
        self.encode, self.decode, self.vectors, self.fingerprint = encode, decode, vectors, fingerprint
