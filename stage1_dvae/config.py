"""The dVAE's architecture, how it trains, and the presets."""

from dataclasses import dataclass
from typing import Literal

from dalle.config import require, setting
from dalle.errors import ConfigError
from dalle.training import Training


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """Architecture; saved beside the weights, and all that is needed to rebuild the model.

    The defaults are the released model: 256×256 pixels ↔ a 32×32 grid of 8,192 codes.
    """

    image_size: int = setting(256, "pixels per side", paper="256 (§2.1)")
    vocab_size: int = setting(8192, "number of codes", paper="8,192 (§2.1)")
    hidden: int = setting(
        256, "channels of the widest grid; later groups have 2×, 4×, 8×", paper="256 (App. A.1)"
    )
    codebook_width: int = setting(128, "channels of the decoder's first layer", paper="128 (released code)")
    groups: int = setting(4, "groups of blocks; all but one halve the resolution", paper="4 (App. A.1)")
    blocks_per_group: int = setting(2, "resblocks per group", paper="2 (App. A.1)")
    patch: int = setting(
        1, "pixels per side that the first and the last layer fold into one position", paper="1"
    )
    gain: float | None = setting(
        None,
        "factor on every resblock's output; none: 1/(groups·blocks_per_group)²",
        paper="1/64 (released code)",
    )
    pixel_std: float | None = setting(
        None,
        "standard deviation of Gaussian pixels of range 0.8; none: logit-Laplace",
        paper="logit-Laplace (App. A.3)",
    )

    def __post_init__(self) -> None:
        require(self, "be above 0", lambda v: v is None or v > 0, "pixel_std")
        sizes = ("image_size", "hidden", "codebook_width", "groups", "blocks_per_group", "patch")
        require(self, "be at least 1", lambda v: v >= 1, *sizes)
        require(self, "be at least 2", lambda v: v >= 2, "vocab_size")
        if self.hidden % 4:
            raise ConfigError(
                f"hidden={self.hidden} must be a multiple of 4: resblocks work at a quarter of it"
            )
        if self.image_size % self.stride:
            lower = max(1, self.image_size // self.stride) * self.stride
            raise ConfigError(
                f"image_size={self.image_size} must be a multiple of {self.stride} (= patch·2^(groups−1)): "
                f"use {lower} or {lower + self.stride}"
            )

    @property
    def stride(self) -> int:
        """Pixels per code and side."""
        return self.patch * 2 ** (self.groups - 1)

    @property
    def grid(self) -> int:
        """Codes per side."""
        return self.image_size // self.stride

    @property
    def resblock_gain(self) -> float:
        """The factor on every resblock's output: 1/n² for n resblocks, unless it is set."""
        return 1 / (self.groups * self.blocks_per_group) ** 2 if self.gain is None else self.gain


@dataclass(frozen=True, kw_only=True)
class DVAETraining(Training):
    """How the dVAE trains. Source of the paper's values: App. A.2."""

    batch_size: int = setting(512, "pictures per update, over all processes", paper="512")
    steps: int = setting(3_000_000, "updates in all", paper="3,000,000")
    lr: float = setting(1e-4, "step size at the start", paper="1e-4")
    lr_end: float = setting(1.25e-6, "step size at the end of its cosine", paper="1.25e-6")
    lr_steps: int = setting(1_200_000, "updates over which the step size falls", paper="1,200,000")
    warmup: int = setting(0, "updates over which the step size first rises", paper="none mentioned")
    beta_start: float = setting(0.0, "weight of the KL term at the start", paper="0")
    beta: float = setting(6.6, "weight of the KL term at the end of its cosine", paper="6.6")
    beta_steps: int = setting(5_000, "updates over which beta changes", paper="5,000")
    tau_start: float = setting(1.0, "temperature of the relaxation at the start", paper="1")
    tau: float = setting(1 / 16, "temperature at the end of its cosine", paper="1/16")
    tau_steps: int = setting(150_000, "updates over which tau falls", paper="150,000")
    usage_weight: float = setting(
        0.0,
        "weight, per position like beta, of the term that pulls a batch's mean posterior to uniform",
        paper="no such term",
    )
    start: Literal["random", "patches"] = setting(
        "random",
        "weights at the start: random, or such that every code stands for a cluster of patches",
        paper="random (released code)",
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean", paper="0.9")
    beta2: float = setting(0.999, "AdamW's decay of the variance", paper="0.999")
    weight_decay: float = setting(1e-4, "AdamW's weight decay", paper="1e-4")
    clip: float | None = setting(None, "largest norm of the gradient; none: no limit", paper="none mentioned")
    ema_decay: float = setting(0.999, "decay of the averaged weights", paper="0.999")
    ema_every: int = setting(1, "updates between two copies into the average", paper="every update")
    flip: bool = setting(True, "mirror half of the pictures", paper="yes (Listing 1)")
    recompute: bool = setting(
        False, "recompute activations in the backward pass: less memory", paper="not stated"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        spans = ("warmup", "lr_steps", "beta_steps", "tau_steps")
        require(self, "not be negative", lambda v: v >= 0, *spans, "lr_end")
        require(self, "be above 0", lambda v: v > 0, "tau_start", "tau")
        if self.precision == "fp16":
            raise ConfigError(
                "precision=fp16 is for train-prior, whose resblocks have gradient scales; the dVAE trains in "
                "auto, bf16 or fp32"
            )


PRESETS: dict[str, tuple[DVAEConfig, DVAETraining]] = {
    # Minutes on two CPU cores. Departures from the paper are explained in docs/paper.md.
    "tiny": (
        DVAEConfig(
            image_size=72,
            vocab_size=4096,
            hidden=192,
            codebook_width=192,
            groups=1,
            blocks_per_group=2,
            patch=8,
            gain=1.0,
            pixel_std=0.035,
        ),
        DVAETraining(
            batch_size=16,
            steps=400,
            lr=3e-4,
            lr_end=1e-5,
            lr_steps=400,
            warmup=50,
            beta_start=0.02,
            beta=0.02,
            beta_steps=400,
            tau_start=1 / 16,
            tau_steps=400,
            usage_weight=0.2,
            start="patches",
            clip=1.0,
            ema_decay=0.998,
            eval_every=200,
            save_every=200,
        ),
    ),
    # One GPU, hours. Not measured yet.
    "small": (
        DVAEConfig(
            image_size=128,
            vocab_size=1024,
            hidden=64,
            codebook_width=64,
            blocks_per_group=1,
            gain=1.0,
            pixel_std=0.035,
        ),
        DVAETraining(
            batch_size=64,
            steps=60_000,
            lr=1e-3,
            lr_end=1e-5,
            lr_steps=60_000,
            warmup=200,
            beta_start=0.3,
            beta_steps=30_000,
            tau_steps=40_000,
            usage_weight=8.0,
            clip=1.0,
            workers=4,
            eval_every=2_000,
            save_every=2_000,
        ),
    ),
    # One machine of GPUs. Not measured yet.
    "base": (
        DVAEConfig(hidden=128, codebook_width=128, vocab_size=8192),
        DVAETraining(
            batch_size=128, steps=300_000, lr=3e-4, lr_end=3e-6, lr_steps=300_000, warmup=500,
            tau_steps=100_000, workers=8, eval_every=5_000, save_every=5_000,
        ),
    ),
    # Every number of the paper.
    "paper": (
        DVAEConfig(),
        DVAETraining(recompute=True, workers=8, eval_every=10_000, save_every=10_000),
    ),
}  # fmt: skip
