"""The prior's architecture, how it trains, and the presets."""

from dataclasses import dataclass, replace
from typing import Literal

from dalle.config import require, setting
from dalle.errors import ConfigError
from dalle.training import LargeTraining

Backend = Literal["auto", "dense", "block", "flex"]

OF_THE_DVAE = "it comes from the run's dVAE"
OF_THE_TOKENIZER = "it comes from the run's tokenizer; --set bpe_vocab=… asks for another"


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Architecture; saved beside the weights, and all that is needed to rebuild the model.

    The defaults are the paper's 12-billion-parameter model.
    """

    text_length: int = setting(256, "text slots; the first is the start of text", paper="256 (§2.2)")
    text_vocab: int = setting(16_384, "text tokens", paper="16,384 (§2.2)", fixed=OF_THE_TOKENIZER)
    image_vocab: int = setting(
        8192, "image tokens: the dVAE's codes", paper="8,192 (§2.2)", fixed=OF_THE_DVAE
    )
    grid: int = setting(32, "image tokens per side", paper="32 (§2.2)", fixed=OF_THE_DVAE)
    depth: int = setting(64, "layers of one attention and one MLP resblock each", paper="64 (App. B.1)")
    width: int = setting(3968, "channels of the residual stream", paper="3,968 (App. B.1)")
    heads: int = setting(62, "attention heads", paper="62 of 64 channels each (App. B.1)")
    code_channels: int = setting(
        0, "channels of a vector by which image tokens share what is learned; 0: none", paper="none"
    )
    kernel: int = setting(11, "cells per side of the convolutional mask; odd", paper="11 (App. B.1)")

    def __post_init__(self) -> None:
        sizes = ("text_vocab", "image_vocab", "grid", "depth", "width", "heads", "kernel")
        require(self, "be at least 1", lambda v: v >= 1, *sizes)
        require(self, "be at least 0", lambda v: v >= 0, "code_channels")
        if self.text_length < 2:
            raise ConfigError(
                f"text_length={self.text_length} must be at least 2: the first slot is the start of text"
            )
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} must be a multiple of heads={self.heads}")
        if self.kernel % 2 == 0:
            raise ConfigError(f"kernel={self.kernel} must be odd")

    @property
    def cells(self) -> int:
        """Image tokens per picture."""
        return self.grid**2

    @property
    def length(self) -> int:
        """Slots of the whole sequence."""
        return self.text_length + self.cells


@dataclass(frozen=True, kw_only=True)
class PriorTraining(LargeTraining):
    """How the prior trains. Source of the paper's values: §2.2 and App. B."""

    batch_size: int = setting(1024, "pictures per update, over all processes", paper="1,024")
    steps: int = setting(430_000, "updates in all", paper="430,000")
    lr: float = setting(4.5e-4, "peak step size", paper="4.5e-4")
    warmup: int = setting(5_000, "updates over which the step size rises", paper="5,000")
    lr_schedule: Literal["plateau", "cosine"] = setting(
        "plateau",
        "after the warm-up: halve where the training loss stops falling, or a cosine",
        paper="halved by hand",
    )
    patience: int = setting(10_000, "updates without progress that make a plateau", paper="not stated")
    lr_end: float = setting(
        4.5e-4 / 32, "step size at the end of the cosine", paper="4.5e-4/32, after five halvings"
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean", paper="0.9")
    beta2: float = setting(0.96, "AdamW's decay of the variance", paper="0.96")
    weight_decay: float = setting(4.5e-2, "AdamW's weight decay", paper="4.5e-2")
    clip: float | None = setting(4.0, "largest norm of the gradient; none: no limit", paper="4")
    variance_limit: float | None = setting(5.0, "largest running variance; none: no limit", paper="5")
    ema_decay: float = setting(0.99, "decay of the averaged weights at each copy", paper="0.99")
    ema_every: int = setting(25, "updates between two copies into the average", paper="25")
    text_weight: float = setting(1 / 8, "weight of the text loss; the image loss has the rest", paper="1/8")
    bpe_vocab: int = setting(
        16_384, "text tokens to learn where the run has no tokenizer yet", paper="16,384"
    )
    bpe_spaces: Literal["alone", "joined"] = setting(
        "alone",
        "a space: a token of its own, or joined to the word after it (half as many tokens)",
        paper="alone (author's note)",
    )
    bpe_captions: int = setting(
        200_000, "captions to learn the text tokens from, at most", paper="not stated"
    )
    bpe_dropout: float = setting(0.1, "share of merges left out while training", paper="0.1")
    caption_dropout: float = setting(
        0.0, "share of pictures shown without their caption, which guidance needs", paper="none"
    )
    code_dropout: float = setting(
        0.0,
        "share of image tokens that no slot sees in training: captions then count for more",
        paper="none",
    )
    guidance: float = setting(
        1.0, "classifier-free guidance: beyond 1 drawings follow the caption more closely", paper="1"
    )
    top_p: float = setting(
        1.0, "drawings keep to the likeliest codes that together reach this probability", paper="1"
    )
    image_start: Literal["random", "codebook"] = setting(
        "random",
        "embeddings of codes at the start: random, or alike where the dVAE's codebook vectors are",
        paper="not stated",
    )
    recompute: bool = setting(
        False, "recompute activations in the backward pass: less memory", paper="yes (App. D)"
    )
    attention: Backend = setting(  # noqa: RUF009 (a field, which ruff cannot see here)
        "auto", "how attention is computed: dense, block, flex (CUDA), or the fastest of them here"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance != 1 and not self.caption_dropout:
            raise ConfigError(
                f"guidance={self.guidance} needs pictures without captions in training: set caption_dropout"
            )
        require(self, "be above 0 and at most 1", lambda v: 0 < v <= 1, "top_p")
        require(self, "be at least 1", lambda v: v >= 1, "bpe_captions")
        require(self, "not be negative", lambda v: v >= 0, "warmup", "patience", "lr_end", "guidance")
        shares = ("text_weight", "bpe_dropout", "caption_dropout", "code_dropout")
        require(self, "lie between 0 and 1", lambda v: 0 <= v <= 1, *shares)


def over_codes(model: PriorConfig, training: PriorTraining, grid: int, vocab_size: int) -> PriorConfig:
    """The same prior over a dVAE's codes, with as many text tokens as may be learned."""
    return replace(model, grid=grid, image_vocab=vocab_size, text_vocab=training.bpe_vocab)


PRESETS: dict[str, tuple[PriorConfig, PriorTraining]] = {
    # Minutes on two CPU cores. Departures from the paper are explained in docs/paper.md.
    "tiny": (
        PriorConfig(text_length=20, depth=4, width=128, heads=4, code_channels=64),
        PriorTraining(
            batch_size=16,
            steps=4_000,
            lr=2e-3,
            lr_end=5e-5,
            warmup=50,
            lr_schedule="cosine",
            beta2=0.98,
            optimizer="muon",
            ema_every=1,
            bpe_vocab=2048,
            bpe_spaces="joined",
            bpe_captions=20_000,
            bpe_dropout=0.0,
            caption_dropout=0.1,
            guidance=1.25,
            top_p=0.8,
            image_start="codebook",
        ),
    ),
    # One GPU, hours.
    "small": (
        PriorConfig(text_length=64, depth=12, width=512, heads=8),
        PriorTraining(
            batch_size=64,
            steps=100_000,
            lr=1e-3,
            lr_end=1e-5,
            warmup=1_000,
            lr_schedule="cosine",
            bpe_vocab=8192,
            workers=4,
            eval_every=2_000,
            save_every=2_000,
        ),
    ),
    # One machine of GPUs.
    "base": (
        PriorConfig(text_length=128, depth=24, width=1024, heads=16),
        PriorTraining(
            batch_size=256,
            steps=300_000,
            lr=6e-4,
            lr_end=6e-6,
            warmup=3_000,
            lr_schedule="cosine",
            recompute=True,
            workers=8,
            eval_every=5_000,
            save_every=5_000,
        ),
    ),
    # The paper's architecture, losses and schedules, its partition and its compression between machines. Its
    # precision and the formats of its weights and moments have to be asked for (docs/paper.md).
    "paper": (
        PriorConfig(),
        PriorTraining(
            zero=3,
            recompute=True,
            compression_rank=896,
            compression_start=0,
            workers=8,
            eval_every=10_000,
            save_every=10_000,
        ),
    ),
}
