"""Training the prior: what the loop is told, from top to bottom.

The dVAE comes as a `Codec`: this stage knows nothing else of the other.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from dalle.checkpoint import read_json
from dalle.config import keys
from dalle.console import say, warn
from dalle.data.augment import centre_crop, stage2_crop
from dalle.data.loader import Loader
from dalle.data.source import BadSample, Sample, Source
from dalle.data.split import HELDOUT_SEED
from dalle.distributed import topology
from dalle.errors import ConfigError
from dalle.optim import parameter_count
from dalle.pictures import contact_sheet, save_png, to_images, to_pixels
from dalle.precision import DTYPES, Arithmetic, arithmetic, best_device
from dalle.process import suit_computing
from dalle.runs import Options, StageRun, resolve_run
from dalle.schedules import Plateau, cosine, warmup
from dalle.text import NO_TOKEN, Tokenizer, cut_or_pad
from dalle.threads import Threads, cores
from dalle.training import Batch, Session, alone, fit
from dalle.wiring import build, make_engine, make_loader, partitioned, precision_of, processes_used, to_device
from dalle.zero import whole
from stage2_prior import backends
from stage2_prior.codec import Codec
from stage2_prior.config import PRESETS, Backend, PriorTraining, over_codes
from stage2_prior.decode import Decoder
from stage2_prior.flops import matrix_flops
from stage2_prior.grow import PICTURES, Coarse, grow
from stage2_prior.loss import losses, weighted
from stage2_prior.model import Prior
from stage2_prior.sample import Sampling, draw, noise, read

SHOWN = 8  # prompts drawn at every evaluation
TRIED = 8  # pictures, at most, with which forms of attention are timed
AT_ONCE = 32  # held-out pictures in one forward pass, at most: no more than in training
SCENE_PROMPTS = (
    "a red circle", "a small blue star", "a large green triangle", "three yellow squares",
    "a red circle left of a blue square", "a purple heart above a cyan diamond", "two orange crosses",
    "a pink ring on a black background",
)  # fmt: skip


def resolve(options: Options, codec: Codec, *, preset: str, data: str) -> StageRun:
    """What `train` would do for these options, in a run whose dVAE is `codec`.

    Args:
        preset: the one to start from where the options name none.
        data: likewise.

    Raises:
        ConfigError: see `dalle.runs.resolve_run`; also a dVAE other than the one this prior was begun on.
    """
    run = resolve_run(
        options, "prior", PRESETS, default_preset=preset, default_data=data, dvae=codec.fingerprint
    )
    if run.resumed:
        begun_on = read_json(run.folder / "config.json").get("dvae")
        if begun_on != codec.fingerprint:
            raise ConfigError(
                f"{run.folder} was begun on the dVAE {begun_on}, the one there now is {codec.fingerprint}: "
                "put that one back, or use another --run"
            )
        return run
    model = over_codes(run.model, run.training, codec.grid, codec.vocab_size)
    # What config.json has may have been measured for another machine by a training that saved nothing.
    asked = "attention" in keys(options.settings)
    training = run.training if asked else replace(run.training, attention="auto")
    return replace(run, model=model, training=training)


def train(options: Options, codec: Codec, *, preset: str, data: str, coarse: Coarse | None = None) -> bool:
    """Train the prior of a run, or continue it. True when all its steps are made.

    Args:
        coarse: what a new prior begins with (`stage2_prior.grow`), and one that goes on has begun with.

    Raises:
        DalleError: settings, data or a run folder that cannot be used.
    """
    with alone(options.run / "prior", topology()):
        session = prepare(options, codec, preset=preset, data=data, coarse=coarse)
        done = fit(session)
    assert isinstance(session.task, Stage2)
    session.task.warn_of_cuts()
    return done


def prepare(
    options: Options, codec: Codec, *, preset: str, data: str, coarse: Coarse | None = None
) -> Session:
    """All that trains the prior of a run; see `train`."""
    suit_computing()
    run = resolve(options, codec, preset=preset, data=data)
    if coarse is not None and not run.resumed:
        coarse.check(run.model, codec)
        if vain := {"bpe_vocab", "bpe_spaces", "bpe_captions"} & keys(options.settings):
            warn(f"--grow-from: the tokenizer is that prior's, so {', '.join(sorted(vain))} changes nothing")
    began_with = _began_with(run, coarse)
    device, here = best_device(), topology()
    precision = precision_of(run.training)

    source, unseen = run.sources(codec.image_size)
    with here.main_first():
        tokenizer = _tokenizer(run, source, coarse)
    attention = here.share(_attention(run, device, precision))
    config: PriorTraining = replace(run.training, attention=attention)
    run = replace(run, model=replace(run.model, text_vocab=tokenizer.vocab_size), training=config)
    words = run.model.text_length - 1
    prepared = partial(
        _prepare, tokenizer=tokenizer, size=codec.image_size, words=words,
        cells=codec.grid**2, bpe_dropout=config.bpe_dropout, caption_dropout=config.caption_dropout,
        code_dropout=config.code_dropout,
    )  # fmt: skip
    loader = make_loader(source, prepared, config, codec.image_size)
    centre = partial(prepare_plainly, tokenizer=tokenizer, size=codec.image_size, words=words)

    def some(of: Source, n: int) -> tuple[Tensor, ...]:
        reader = Loader(of, centre, batch_size=1, seed=HELDOUT_SEED, min_side=codec.image_size)
        found = reader.some(n)
        loader.skipped |= reader.skipped
        return found

    heldout = tuple(t.to(device) for t in some(unseen, config.eval_pictures))
    model = _model(run, codec, coarse, lambda: some(source, PICTURES)[0].to(device))
    engine = make_engine(
        model, config, precision, variance_limit=config.variance_limit, matrices=model.matrices(),
    )  # fmt: skip
    say(
        f"prior: {run.folder} · preset {run.preset} · {parameter_count(model):,} parameters · "
        f"{run.model.text_length} text + {run.model.cells} image tokens of {tokenizer.vocab_size:,} and "
        f"{run.model.image_vocab:,} · {len(source):,} pictures of {run.data} · {device.type} "
        f"{precision}, {attention} attention{processes_used(config)}"
    )
    prompts = list(SCENE_PROMPTS) if run.data == "scenes" else _captions(unseen, SHOWN)
    stage = Stage2(model, run, codec, tokenizer, heldout, prompts, precision)
    grown = {"grown_from": began_with} if began_with else {}
    write = partial(run.write, dvae=codec.fingerprint, tokenizer=tokenizer.fingerprint(), **grown)
    return Session(stage, engine, loader, run.folder, here, run.budget(), write)


def _model(run: StageRun, codec: Codec, coarse: Coarse | None, pictures: Callable[[], Tensor]) -> Prior:
    """The prior as a new run begins; one that goes on loads its weights afterwards."""
    config: PriorTraining = run.training
    model = build(lambda: Prior(run.model), config)
    if config.image_start == "codebook":
        with whole(model.of_codes()):
            model.start_from(codec.vectors, config.seed)
    if coarse is not None and not run.resumed:
        of, to = coarse.codec.grid, codec.grid
        say(f"prior: beginning with one over {of}×{of} codes, for {to}×{to}")
        grow(model, coarse, codec, pictures())
    to_device(model, config)
    # A partitioned layer would otherwise stay whole until its backward pass.
    model.recompute = config.recompute or partitioned(config)
    model.attend_by(config.attention)
    return model


def _attention(run: StageRun, device: torch.device, precision: Arithmetic) -> Backend:
    """The setting resolved. It is kept in config.json: a run that goes on has to give the same bits."""
    config: PriorTraining = run.training
    pictures = max(1, config.pictures_at_once(topology().world) // cores(device))
    return backends.choose(config.attention, run.model, min(pictures, TRIED), DTYPES[precision], device)


def _began_with(run: StageRun, coarse: Coarse | None) -> str | None:
    """The fingerprint of the prior that this one begins, or began, with, if any.

    Raises:
        ConfigError: `coarse` is not the one that the run was begun with; or it is not named again for a run
            that has saved nothing of what it began with.
    """
    path = run.folder / "config.json"
    began: str | None = read_json(path).get("grown_from") if path.exists() else None
    if not run.resumed:
        if began and coarse is None:
            raise ConfigError(
                f"{run.folder} was begun with the prior {began} and saved nothing: give --grow-from again, "
                "or use another --run"
            )
        return coarse.fingerprint if coarse else None
    if coarse is not None and began != coarse.fingerprint:
        raise ConfigError(
            f"{run.folder} was begun {f'with the prior {began}' if began else 'without another prior'}, "
            f"--grow-from names {coarse.fingerprint}: leave it out, or use another --run"
        )
    return began


def _tokenizer(run: StageRun, source: Source, coarse: Coarse | None) -> Tokenizer:
    """The run's tokenizer: in a new run that of the prior it grows from, or learned from the captions."""
    path = run.folder / "tokenizer.json"
    if run.resumed:
        tokenizer, begun_with = Tokenizer.load(path), read_json(run.folder / "config.json").get("tokenizer")
        if begun_with != tokenizer.fingerprint():
            raise ConfigError(
                f"{run.folder} was begun with the tokenizer {begun_with}, {path} is now "
                f"{tokenizer.fingerprint()}: put that one back, or use another --run"
            )
        return tokenizer
    if not topology().main:
        return Tokenizer.load(path)  # which process 0 has just written
    if coarse is not None:
        tokenizer = coarse.tokenizer
    else:
        say(f"prior: learning up to {run.training.bpe_vocab:,} text tokens from the captions")
        captions = _some_captions(source, run.training.bpe_captions)
        tokenizer = Tokenizer.train(captions, run.training.bpe_vocab, run.training.bpe_spaces)
    tokenizer.save(path)
    return tokenizer


def _some_captions(source: Source, most: int) -> Iterator[str]:
    """All captions of evenly spread samples, at most about `most`."""
    for index in range(0, len(source), max(1, len(source) // most)):
        try:
            yield from source.captions(index)
        except BadSample:
            continue


def _captions(source: Source, n: int) -> list[str]:
    """The first caption of `n` samples, evenly spread; fewer where fewer have one."""
    spread = max(1, len(source) // n)
    found: list[str] = []
    for index in (i for first in range(spread) for i in range(first, len(source), spread)):
        if len(found) == n:
            break
        with suppress(BadSample):
            found.append(source.captions(index)[0])
    return found


def _prepare(
    sample: Sample,
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    size: int,
    words: int,
    cells: int,
    bpe_dropout: float,
    caption_dropout: float,
    code_dropout: float,
) -> tuple[Tensor, ...]:
    """Pixels, tokens, whether the caption was cut, and which codes no slot will see."""
    pixels = stage2_crop(sample.image, size, rng)
    caption = sample.captions[int(rng.integers(len(sample.captions)))]
    tokens, was_cut = cut_or_pad(tokenizer.encode(caption, dropout=bpe_dropout, rng=rng), words)
    if caption_dropout and rng.random() < caption_dropout:
        tokens[:] = NO_TOKEN
    hidden = rng.random(cells) < code_dropout if code_dropout else np.zeros(cells, dtype=bool)
    return *map(torch.from_numpy, (pixels, tokens)), torch.tensor(was_cut), torch.from_numpy(hidden)


def prepare_plainly(
    sample: Sample, _: np.random.Generator, tokenizer: Tokenizer, size: int, words: int
) -> tuple[Tensor, Tensor]:
    """The middle of a sample's picture in 8 bits, and the tokens of its first caption."""
    tokens, _cut = cut_or_pad(tokenizer.encode(sample.captions[0]), words)
    return torch.from_numpy(centre_crop(sample.image, size)), torch.from_numpy(tokens)


class Stage2:
    """What the loop asks of stage 2; see `dalle.training.Task`."""

    label = "prior"

    def __init__(
        self,
        model: Prior,
        run: StageRun,
        codec: Codec,
        tokenizer: Tokenizer,
        heldout: tuple[Tensor, ...],
        prompts: list[str],
        precision: Arithmetic,
    ) -> None:
        self.model, self.run, self.codec, self.precision = model, run, codec, precision
        self.config: PriorTraining = run.training
        self.tokens_per_picture = run.model.length
        self.flops_per_picture = 3 * matrix_flops(run.model)  # the backward pass takes twice the forward's
        # Gradients of weights in fp16 are gathered beside autograd, which two threads must not do at a time.
        halved = self.config.weights == "fp16"
        self.threads = Threads(1 if halved else cores(model.start_of_text.device))
        self.plateau = Plateau(self.config.patience)
        self.heldout_tokens = heldout[1]
        # Captions cut to the text slots since the start, counted where batches lie; and all captions.
        self.cut, self.seen = torch.zeros_like(self.heldout_tokens[0, 0]), 0
        self.at_once = min(AT_ONCE, self.config.pictures_at_once(topology().world))
        self.heldout_codes = torch.cat([self.encode(part) for part in heldout[0].split(self.at_once)])
        counts = torch.bincount(self.heldout_codes.flatten(), minlength=codec.vocab_size).double()
        p = counts[counts > 0] / counts.sum()
        self.unigram_entropy = float((p * -p.log()).sum())
        self.words = 0.0  # text tokens of a micro-batch, in the mean over the batch
        self.prompts = prompts
        rows = [cut_or_pad(tokenizer.encode(prompt), run.model.text_length - 1)[0] for prompt in prompts]
        self.prompt_tokens = torch.from_numpy(np.stack(rows)).to(self.heldout_tokens.device)

    def encode(self, pixels: Tensor) -> Tensor:
        """8-bit pixels to image tokens, `b cells`: the dVAE's most probable codes in raster order.

        Held-out pictures in the types of training's, or codes that decode alike would be taken for others.
        """
        with arithmetic(self.precision, pixels.device):
            return self.codec.encode(to_pixels(pixels)).flatten(1)

    def lr(self, step: int) -> float:
        """The step size."""
        c = self.config
        if c.lr_schedule == "plateau":
            return warmup(step, c.warmup) * self.plateau.factor * c.lr
        return warmup(step, c.warmup) * cosine(step, c.steps, c.lr, c.lr_end)

    def begin(self, batches: Sequence[Batch], run: Callable[..., Any]) -> None:
        """Count the text tokens of the whole batch: their loss is a mean over all of them."""
        words = topology().sum(torch.stack([(tokens >= 0).sum() for _, tokens, *_ in batches]).sum())
        self.words = int(words) / (len(batches) * topology().world)

    def loss(self, batch: Batch, step: int, positions: range) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted cross-entropy of one micro-batch."""
        pixels, tokens, cut, hidden = batch
        self.cut, self.seen = self.cut + cut.sum(), self.seen + len(cut)
        unseen = hidden if self.config.code_dropout else None
        text, image = losses(self.model, tokens, self.encode(pixels), self.words, self.threads, unseen)
        loss = weighted(text, image, self.config.text_weight)
        return loss, self.metrics(text.detach(), image.detach())

    def metrics(self, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Nats per token of both kinds, and what that makes for a whole picture."""
        return {
            "text_loss": text,
            "image_loss": image,
            "image_bits_per_picture": image * self.run.model.cells / math.log(2),
        }

    def after(self, loss: float) -> None:
        """The plateau rule watches the training loss."""
        self.plateau.observe(loss)

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out losses, and drawings of the fixed prompts in pictures/ unless the model is partitioned."""
        sums: dict[str, float] = {}
        words = int((self.heldout_tokens >= 0).sum()) / len(self.heldout_tokens)  # of a caption
        parts = (held.split(self.at_once) for held in (self.heldout_tokens, self.heldout_codes))
        for tokens, codes in zip(*parts, strict=True):
            text, image = losses(self.model, tokens, codes, words * len(codes), self.threads)
            loss = weighted(text, image, self.config.text_weight)
            for name, value in {"loss": loss, **self.metrics(text, image)}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(codes) / len(self.heldout_codes)
        metrics = {f"heldout_{name}": value for name, value in sums.items()}
        metrics["heldout_unigram_entropy"] = self.unigram_entropy
        say(
            f"prior: step {step:,} · held-out text {metrics['heldout_text_loss']:.3f}, image "
            f"{metrics['heldout_image_loss']:.3f} nats/token (codes alone {self.unigram_entropy:.3f}) · "
            f"{metrics['heldout_image_bits_per_picture']:,.0f} bits/picture"
        )
        # Drawing takes the whole model, which no process holds where it is partitioned.
        if topology().main and not partitioned(self.config):
            save_png(self.run.folder / "pictures" / f"step-{step:08d}.png", self.drawings())
        return metrics

    def warn_of_cuts(self) -> None:
        """Say how many captions were too long."""
        cut, seen = topology().sum(torch.tensor([int(self.cut), self.seen])).tolist()
        if cut:
            words = self.run.model.text_length - 1
            warn(f"{cut:,} of {seen:,} captions were cut to {words} tokens: raise text_length")

    def drawings(self) -> Image:
        """One drawing of each fixed prompt, always with the same noise."""
        cells = self.run.model.cells
        uniform = noise(self.config.seed, range(len(self.prompts)), cells)
        decoder = Decoder(self.model, len(self.prompts), precision=self.precision)
        how = Sampling(top_p=self.config.top_p, guidance=self.config.guidance)
        text = read(decoder, self.prompt_tokens, how)
        drawn = torch.stack(list(draw(decoder, text, uniform, how)), 1)
        pixels = self.codec.decode(drawn.reshape(-1, self.codec.grid, self.codec.grid))
        return contact_sheet(to_images(pixels), self.prompts)

    def state(self) -> dict[str, Any]:
        """What the plateau rule remembers."""
        return {"plateau": dict(vars(self.plateau))}  # a copy: it is written while training goes on

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.plateau = Plateau(**state["plateau"])
