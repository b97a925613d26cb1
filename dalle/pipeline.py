"""From prompts to pictures: the tokenizer, the prior, and the dVAE on whose codes it was trained."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor

from dalle.builtin import find_run
from dalle.checkpoint import fingerprint, read_json
from dalle.errors import CheckpointError, ConfigError, DataError
from dalle.pictures import to_images
from dalle.precision import Precision, best_device, choose, set_up
from dalle.text import Tokenizer, cut_or_pad
from stage1_dvae.model import DVAE
from stage2_prior.codec import Codec
from stage2_prior.decode import Decoder, Text
from stage2_prior.grow import Coarse
from stage2_prior.linear import Weights
from stage2_prior.model import Prior
from stage2_prior.sample import Sampling, draw, noise, read

AT_ONCE = 16  # pictures drawn side by side, unless asked otherwise
PREVIEWS = 8  # of a picture, at most
Preview = Callable[[int, list[Image]], None]


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
    top_p: float = 1.0  # likewise
    weights: Weights = "auto"
    at_once: int = AT_ONCE
    _decoders: list[Decoder] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise ConfigError(f"at_once={self.at_once} must be at least 1")
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
        cls,
        run: Path | str,
        device: torch.device | str | None = None,
        precision: Precision = "auto",
        weights: Weights = "auto",
        at_once: int = AT_ONCE,
    ) -> "TextToImage":
        """The model of the run folder `run`; "scenes" is the built-in one.

        Args:
            device: where to draw; by default CUDA where there is one.
            precision: of the matrix products; by default what the device is faster in.
            weights: how the prior's are kept while it draws, see `stage2_prior.linear`; by default as they
                are on a CPU, in `precision` on a GPU.
            at_once: pictures drawn side by side. However many are asked for, memory is needed for so many.

        Raises:
            ConfigError: at_once is less than 1, or the device has no arithmetic of this `precision`.
            CheckpointError: a stage is missing or damaged, or the prior was trained on another dVAE or
                tokenizer.
        """
        run, device = find_run(Path(run)), set_up(torch.device(device)) if device else best_device()
        _refuse_untrained(run, "dvae", "prior")
        began, tokenizer = _fitting(run)
        trained = _numbers(began.get("training"), run / "prior" / "config.json")
        return cls(
            tokenizer,
            Prior.load(run / "prior", device),
            DVAE.load(run / "dvae", device),
            choose(precision, device),
            trained["guidance"] if trained["caption_dropout"] else None,
            trained["top_p"],
            weights,
            at_once,
        )

    def resolve(self, sampling: Sampling | None) -> Sampling:
        """What drawing so means with this model: its own top-p and guidance where none are asked for.

        Raises:
            ConfigError: guidance of a prior that was not trained for it.
        """
        sampling = sampling or Sampling()
        top_p = self.top_p if sampling.top_p is None else sampling.top_p
        guidance = self.guidance if sampling.guidance is None else sampling.guidance
        if self.guidance is None and guidance not in (None, 1):
            raise ConfigError(
                f"guidance={guidance} needs a prior that has seen pictures without their captions: "
                "train one with --set caption_dropout=0.1"
            )
        return replace(sampling, top_p=top_p, guidance=1.0 if guidance is None else guidance)

    def __call__(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        *,
        seed: int | Sequence[int] = 0,
        sampling: Sampling | None = None,
        on_token: Callable[[int], None] | None = None,
        preview: Preview | None = None,
    ) -> list[Image]:
        """Draw `n` pictures for every prompt, in the order of the prompts. See `stream`."""
        return list(self.stream(prompts, n, seed=seed, sampling=sampling, on_token=on_token, preview=preview))

    def stream(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        *,
        seed: int | Sequence[int] = 0,
        sampling: Sampling | None = None,
        on_token: Callable[[int], None] | None = None,
        preview: Preview | None = None,
    ) -> Iterator[Image]:
        """Draw `n` pictures for every prompt, in the order of the prompts, and give each when it is finished.

        The same (prompt, seed) gives the same pictures, whatever n is and whatever is drawn beside them; with
        weights or inputs in bf16 or less, whose sums depend on n, about one picture in ten is another.

        Args:
            seed: decides the noise; one for all prompts, or one for each.
            sampling: temperature, top-k, top-p and guidance; by default temperature 1, as in the paper, and
                the run's own top-p and guidance.
            on_token: called with the number of image tokens drawn since the last call.
            preview: called every few rows with the pictures under way, grey where nothing is drawn yet, and
                with the place of the first of them among all.

        Raises:
            ConfigError: the device has no such weights, the prior was not trained for guidance, or its
                weights are broken; when the first picture is asked for.
            DataError: a prompt is empty, longer than the prior's text slots, n is less than 1, or there are
                not as many seeds as prompts.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if n < 1:
            raise DataError(f"n={n} pictures cannot be drawn; ask for at least 1")
        if not prompts:
            return
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise DataError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one, or one for each")
        tokens = self._tokens(prompts).to(self.prior.start_of_text.device)
        together = min(max(1, self.at_once // n), len(prompts))  # prompts drawn side by side
        sampling = self.resolve(sampling)
        decoder = self._decoder(sampling.texts * together * min(n, self.at_once))
        finished = 0

        def on_codes(drawn: list[Tensor]) -> None:
            if on_token is not None:
                on_token(len(drawn[0]))
            if preview is not None:
                self._preview(drawn, lambda pictures: preview(finished, pictures))

        for at in range(0, len(prompts), together):
            text = read(decoder, tokens[at : at + together], sampling)
            for first in range(0, n, self.at_once):
                pictures = range(first, min(first + self.at_once, n))
                codes = self._codes(decoder, text, seeds[at : at + together], pictures, sampling, on_codes)
                images = self._images(codes)
                yield from images
                finished += len(images)

    def _decoder(self, rows: int) -> Decoder:
        """The prior in the form for so many pictures side by side; kept until another number is asked for."""
        if not self._decoders or self._decoders[0].rows != rows:
            precision = choose(self.precision, self.prior.start_of_text.device)
            self._decoders[:] = [Decoder(self.prior, rows, self.weights, precision)]
        return self._decoders[0]

    def _tokens(self, prompts: Sequence[str]) -> Int[Tensor, "p words"]:
        words = self.prior.config.text_length - 1
        rows = []
        for prompt in prompts:
            if not prompt.strip():
                raise DataError("an empty prompt cannot be drawn; say what the picture should show")
            row, was_cut = cut_or_pad(self.tokenizer.encode(prompt.strip()), words)
            if was_cut:
                raise DataError(
                    f"the prompt {prompt[:40]!r}… has over {words} tokens, this model's limit; shorten it"
                )
            rows.append(row)
        return torch.from_numpy(np.stack(rows))

    def _codes(
        self,
        decoder: Decoder,
        text: Text,
        seeds: Sequence[int],
        pictures: range,
        sampling: Sampling,
        on_codes: Callable[[list[Tensor]], None] | None = None,
    ) -> Int[Tensor, "b grid grid"]:
        """The codes of these pictures of every prompt, prompt by prompt."""
        grid = self.prior.config.grid
        uniform = torch.cat([noise(seed, pictures, grid**2) for seed in seeds])
        drawn: list[Tensor] = []
        for codes in draw(decoder, text, uniform, sampling):
            drawn.append(codes)
            if on_codes is not None:
                on_codes(drawn)
        return torch.stack(drawn, 1).reshape(len(uniform), grid, grid)

    @torch.inference_mode()
    def _images(self, codes: Int[Tensor, "b grid grid"]) -> list[Image]:
        return to_images(self.dvae.decode(codes))

    def _preview(self, drawn: list[Tensor], show: Callable[[list[Image]], None]) -> None:
        """Show the rows drawn so far, now and then."""
        grid = self.prior.config.grid
        rows, rest = divmod(len(drawn), grid)
        if rest or rows == grid or rows % max(1, grid // PREVIEWS):
            return
        codes = F.pad(torch.stack(drawn, 1), (0, grid**2 - len(drawn)))
        pictures = self._images(codes.reshape(-1, grid, grid))
        for picture in pictures:
            picture.paste("grey", (0, picture.height * rows // grid, *picture.size))
        show(pictures)


def _fitting(run: Path) -> tuple[dict[str, Any], Tokenizer]:
    """The prior's config.json and its tokenizer, where it was trained on what the run holds now.

    Raises:
        CheckpointError: it was trained on another dVAE or tokenizer, or a file is missing or damaged.
    """
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
    return began, tokenizer


def _numbers(training: Any, path: Path) -> dict[str, float]:
    """Of the prior's settings those that drawing follows; neutral where there are none."""
    neutral = {"guidance": 1.0, "top_p": 1.0, "caption_dropout": 0.0}
    found = {**neutral, **(training if isinstance(training, dict) else {})}
    for name in neutral:
        if not isinstance(found[name], (int, float)):
            raise CheckpointError(f"{path} is damaged: {name} is {found[name]!r}, no number")
    return {name: float(found[name]) for name in neutral}


def codec_of(run: Path) -> Codec:
    """The trained dVAE of a run as the prior's training wants it.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    _refuse_untrained(run, "dvae")
    dvae = DVAE.load(run / "dvae", best_device()).for_speed()
    config = dvae.config
    return Codec(
        config.image_size, config.grid, config.vocab_size, dvae.encode, dvae.decode, dvae.codebook(),
        fingerprint_of(run),
    )  # fmt: skip


def coarse_of(run: Path) -> Coarse:
    """A run for a prior over finer codes to begin with.

    Raises:
        CheckpointError: it lacks a stage, is damaged, or its prior was trained on another dVAE or tokenizer.
    """
    run = find_run(run)
    codec = codec_of(run)
    _refuse_untrained(run, "prior")
    _, tokenizer = _fitting(run)
    weights = run / "prior" / "weights.safetensors"
    return Coarse(Prior.load(run / "prior"), codec, tokenizer, fingerprint(weights))


def _refuse_untrained(run: Path, *stages: str) -> None:
    """Raises `CheckpointError` where one of these has no weights."""
    for stage in stages:
        if not (run / stage / "weights.safetensors").is_file():
            raise CheckpointError(
                f"{run} holds no trained {stage}: `dalle train-{stage} --run {quote(str(run))}` trains one; "
                "or name another --run"
            )


def fingerprint_of(run: Path) -> str:
    """The fingerprint of the dVAE of a run; see `dalle.checkpoint.fingerprint`."""
    return fingerprint(run / "dvae" / "weights.safetensors")
