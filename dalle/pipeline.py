"""From prompts to pictures: the tokenizer, the prior, and the dVAE on whose codes it was trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor

from dalle.builtin import find_run
from dalle.checkpoint import fingerprint, read_json
from dalle.errors import CheckpointError, ConfigError, DataError
from dalle.pictures import to_images
from dalle.precision import Precision, arithmetic, best_device, choose
from dalle.text import Tokenizer, fit
from stage1_dvae.model import DVAE
from stage2_prior.codes import Codes
from stage2_prior.model import Prior
from stage2_prior.sample import Sampling, draw, noise

AT_ONCE = 16  # pictures drawn side by side


@dataclass(frozen=True)
class TextToImage:
    """A run, ready to draw.

    model = TextToImage.load("runs/default")
    pictures = model("a red circle", n=4, seed=0)
    """

    tokenizer: Tokenizer
    prior: Prior
    dvae: DVAE
    precision: Precision = "fp32"
    guidance: float | None = None  # what it draws with; None: it never saw a picture without its caption

    def __post_init__(self) -> None:
        for what, ours, theirs in (
            ("grid", self.prior.config.grid, self.dvae.config.grid),
            ("codes", self.prior.config.image_vocab, self.dvae.config.vocab_size),
            ("text tokens", self.prior.config.text_vocab, self.tokenizer.vocab_size),
        ):
            if ours != theirs:
                raise CheckpointError(
                    f"the parts do not fit: {what} is {ours} in the prior, {theirs} in its partner"
                )

    @classmethod
    def load(
        cls, run: Path | str, device: torch.device | str | None = None, precision: Precision = "auto"
    ) -> "TextToImage":
        """The model of the run folder `run`; "scenes" is the built-in one.

        Args:
            device: where to draw; by default CUDA where there is one.
            precision: of the matrix products; by default what the device is faster in.

        Raises:
            CheckpointError: a stage is missing or damaged, or the prior was trained on another dVAE or
                tokenizer.
        """
        run, device = find_run(Path(run)), torch.device(device) if device else best_device()
        for stage, command in (("dvae", "train-dvae"), ("prior", "train-prior")):
            if not (run / stage / "weights.safetensors").is_file():
                raise CheckpointError(
                    f"{run} holds no trained {stage}: `dalle {command} --run {run}` trains one; "
                    "or name another --run"
                )
        began = read_json(run / "prior" / "config.json")
        tokenizer = Tokenizer.load(run / "prior" / "tokenizer.json")
        for part, trained_on, path, present in (
            ("dVAE", began.get("dvae"), run / "dvae", fingerprint_of(run)),
            ("tokenizer", began.get("tokenizer"), run / "prior" / "tokenizer.json", tokenizer.fingerprint()),
        ):
            if trained_on != present:
                raise CheckpointError(
                    f"the prior in {run / 'prior'} was trained on the {part} {trained_on}, but {path} is "
                    f"{present}: put that {part} back, or train the prior anew in another --run"
                )
        trained: dict[str, Any] = began.get("training", {})
        return cls(
            tokenizer,
            Prior.load(run / "prior", device),
            DVAE.load(run / "dvae", device),
            choose(precision, device),
            trained.get("guidance", 1.0) if trained.get("caption_dropout") else None,
        )

    def resolve(self, sampling: Sampling | None) -> Sampling:
        """What drawing so means with this model: its own guidance where none is asked for.

        Raises:
            ConfigError: guidance of a prior that was not trained for it.
        """
        sampling = sampling or Sampling()
        if sampling.guidance is None:
            return replace(sampling, guidance=1.0 if self.guidance is None else self.guidance)
        if sampling.guidance != 1 and self.guidance is None:
            raise ConfigError(
                f"guidance={sampling.guidance} needs a prior that has seen pictures without their captions: "
                "train one with --set caption_dropout=0.1"
            )
        return sampling

    def __call__(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        *,
        seed: int | Sequence[int] = 0,
        sampling: Sampling | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[Image]:
        """Draw `n` pictures for every prompt, in the order of the prompts.

        The same (prompt, seed) gives the same pictures, whatever n is and whatever is drawn beside them.

        Args:
            seed: decides the noise; one for all prompts, or one for each.
            sampling: temperature, top-k, top-p and guidance; by default temperature 1, as in the paper, and
                the model's own guidance.
            on_token: called with the number of image tokens drawn since the last call.

        Raises:
            DataError: a prompt is empty, longer than the prior's text slots, n is less than 1, or there are
                not as many seeds as prompts.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if n < 1:
            raise DataError(f"n={n} pictures cannot be drawn; ask for at least 1")
        if not prompts:
            return []
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise DataError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one, or one for each")
        sampling = self.resolve(sampling)
        together = max(1, AT_ONCE // n)  # prompts drawn side by side
        tokens = self._tokens(prompts)
        codes = [
            self._codes(tokens[at : at + together], seeds[at : at + together], pictures, sampling, on_token)
            for at in range(0, len(prompts), together)
            for pictures in (range(i, min(i + AT_ONCE, n)) for i in range(0, n, AT_ONCE))
        ]
        with torch.inference_mode():
            return [image for part in codes for image in to_images(self.dvae.decode(part))]

    def _tokens(self, prompts: Sequence[str]) -> Int[Tensor, "p words"]:
        words = self.prior.config.text_length - 1
        rows = []
        for prompt in prompts:
            if not prompt.strip():
                raise DataError("an empty prompt cannot be drawn; say what the picture should show")
            row, was_cut = fit(self.tokenizer.encode(prompt.strip()), words)
            if was_cut:
                raise DataError(
                    f"the prompt {prompt[:40]!r}… has over {words} tokens, this model's limit; shorten it"
                )
            rows.append(row)
        return torch.from_numpy(np.stack(rows))

    def _codes(
        self,
        tokens: Int[Tensor, "p words"],
        seeds: Sequence[int],
        pictures: range,
        sampling: Sampling,
        on_token: Callable[[int], None] | None,
    ) -> Int[Tensor, "b grid grid"]:
        """The codes of these pictures of every prompt, prompt by prompt."""
        config, device = self.prior.config, self.prior.start_of_text.device
        uniform = torch.cat([noise(seed, pictures, config.cells) for seed in seeds])
        drawn = []
        with arithmetic(choose(self.precision, device), device):
            for codes in draw(self.prior, tokens.to(device), uniform, sampling):
                drawn.append(codes)
                if on_token is not None:
                    on_token(len(uniform))
        return torch.stack(drawn, 1).reshape(len(uniform), config.grid, config.grid)


def codes_of(run: Path) -> Codes:
    """The trained dVAE of a run as the prior's training wants it.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not (run / "dvae" / "weights.safetensors").is_file():
        raise CheckpointError(
            f"{run} holds no trained dvae: run `dalle train-dvae --run {run}` first, or name another --run"
        )
    dvae = DVAE.load(run / "dvae", best_device())
    config = dvae.config
    return Codes(
        config.image_size, config.grid, config.vocab_size, dvae.encode, dvae.decode, dvae.codebook(),
        fingerprint_of(run),
    )  # fmt: skip


def fingerprint_of(run: Path) -> str:
    """The fingerprint of the dVAE of a run; see `dalle.checkpoint.fingerprint`."""
    return fingerprint(run / "dvae" / "weights.safetensors")
