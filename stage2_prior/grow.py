"""A prior over fine codes that begins with what one over coarser codes of the same pictures has learned.

To read captions, and to tell which word belongs to which object, takes most of a training and has nothing to
do with how fine the codes are; over fine codes, where most tokens follow from their neighbours, it takes
longer still. So the transformer, the text's embeddings and the text head are taken over as they are. A row
or a column begins as the coarse one that it lies in, a code as the mean of the coarse codes in whose place
pictures show it. Not the paper's; what it gains stands in docs/log.md.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dalle.errors import ConfigError
from dalle.pictures import to_pixels
from dalle.text import Tokenizer
from dalle.zero import whole
from stage2_prior.codec import Codec
from stage2_prior.config import PriorConfig
from stage2_prior.model import CodeTables, Prior

PICTURES = 1000  # in which codes are looked for
AT_ONCE = 50  # of them
OF_CODES = ("rows", "columns", "image_tokens", "image_head", "code_vectors")  # where the two differ


@dataclass(frozen=True)
class Coarse:
    """A trained prior, its dVAE and its tokenizer; `fingerprint` names its weights."""

    prior: Prior
    codec: Codec
    tokenizer: Tokenizer
    fingerprint: str

    def check(self, model: PriorConfig, codec: Codec) -> None:
        """Can a prior of this shape, over these codes, begin with this one?

        Raises:
            ConfigError: no, and why.
        """
        mine = self.prior.config
        for name in ("text_length", "depth", "width", "heads"):
            its, wanted = getattr(mine, name), getattr(model, name)
            if its != wanted:
                raise ConfigError(
                    f"--grow-from: that prior has {name}={its}, the new one {name}={wanted}: "
                    f"--set {name}={its}"
                )
        if self.codec.image_size != codec.image_size:
            raise ConfigError(
                f"--grow-from: that prior's pictures have {self.codec.image_size} pixels per side, the new "
                f"one's {codec.image_size}: train a dVAE of the same image_size"
            )
        if codec.grid % mine.grid:
            raise ConfigError(
                f"--grow-from: {mine.grid} codes per side do not divide the new one's {codec.grid}: train a "
                f"dVAE whose codes are a whole number of times finer"
            )


@torch.no_grad()
def grow(fine: Prior, coarse: Coarse, codec: Codec, pictures: UInt8[Tensor, "n 3 h w"]) -> None:
    """Let `fine`, a prior over the codes of `codec`, begin with `coarse`, which fits it (see `Coarse.check`).

    Codes that none of the pictures show begin at 0. Code vectors keep their start and add nothing to the
    tables before they have learned.
    """
    learned = dict(coarse.prior.named_parameters())
    for name, parameter in fine.named_parameters():
        if name.split(".")[0] not in OF_CODES:
            _put(parameter, learned[name])
    times = fine.config.grid // coarse.prior.config.grid
    _put(fine.rows.weight, coarse.prior.rows.weight.repeat_interleave(times, 0))
    _put(fine.columns.weight, coarse.prior.columns.weight.repeat_interleave(times, 0))

    tables = coarse.prior.code_tables()
    sums = CodeTables(*(torch.zeros(codec.vocab_size, fine.config.width) for _ in tables))
    shown = torch.zeros(codec.vocab_size)
    for some in pictures.split(AT_ONCE):
        of_fine, of_coarse = _in_the_same_place(codec, coarse.codec, to_pixels(some))
        shown += torch.bincount(of_fine, minlength=codec.vocab_size)
        for total, table in zip(sums, tables, strict=True):
            total.index_add_(0, of_fine, table.cpu()[of_coarse])
    embedding, head = (total / shown.clamp_min(1)[:, None] for total in sums)
    _put(fine.image_tokens.weight, embedding)
    _put(fine.image_head.weight, head)
    likely = (1 + shown).log()
    _put(fine.image_head.bias, likely - likely.mean())
    if fine.code_vectors is not None:
        _put(fine.code_vectors.embedding.weight, torch.zeros(()))
        _put(fine.code_vectors.head.weight, torch.zeros(()))


def _put(parameter: Tensor, values: Tensor) -> None:
    """Write a parameter, one at a time: where the model is partitioned no process ever holds all of it."""
    with whole([parameter]):
        parameter.copy_(values)


def _in_the_same_place(
    fine: Codec, coarse: Codec, pixels: Float[Tensor, "b 3 h w"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Every fine code of the pictures, and the coarse one around it."""
    of_fine, of_coarse = fine.encode(pixels).cpu(), coarse.encode(pixels).cpu()
    times = fine.grid // coarse.grid
    around = of_coarse.repeat_interleave(times, 1).repeat_interleave(times, 2)
    return of_fine.flatten(), around.flatten()
