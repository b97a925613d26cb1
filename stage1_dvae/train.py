"""Training the dVAE: what the loop is told, from top to bottom."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.console import Bar, say, warn
from dalle.data.augment import centre_crop, stage1_crop
from dalle.data.loader import Loader
from dalle.data.source import Sample
from dalle.data.split import HELDOUT_SEED
from dalle.distributed import topology
from dalle.errors import ConfigError
from dalle.noise import noise_of
from dalle.optim import parameter_count
from dalle.pictures import grid, save_png, to_images, to_pixels
from dalle.precision import best_device, fp32_products
from dalle.process import held, suit_computing
from dalle.runs import Options, StageRun, begun, machine_preset, resolve_run
from dalle.schedules import cosine, warmup
from dalle.states import newest_step, state_folders
from dalle.training import Batch, Session, alone, fit
from dalle.wiring import build, make_engine, make_loader, partitioned, precision_of, processes_used, to_device
from dalle.zero import whole
from stage1_dvae.codebook import ALARM, CodebookWindow
from stage1_dvae.config import PRESETS, DVAETraining
from stage1_dvae.likelihood import log_likelihood, reconstruction
from stage1_dvae.loss import elbo
from stage1_dvae.model import DVAE, matrix_flops
from stage1_dvae.start import pictures_needed, start_from_patches

EVALUATION = 1 << 40  # keys the noise of evaluations apart from that of any step
SHOWN = 8  # pictures in the grid of an evaluation
AT_ONCE = 64  # held-out pictures in one forward pass, at most: no more than in training


def resolve(options: Options) -> StageRun:
    """What `train` would do for these options."""
    return resolve_run(options, "dvae", PRESETS, default_preset=machine_preset())


def train(options: Options) -> bool:
    """Train the dVAE of a run, or continue it. True when all its steps are made.

    Raises:
        DalleError: settings, data or a run folder that cannot be used.
    """
    with alone(options.run / "dvae", topology()):
        _spare_the_prior(options)
        return fit(prepare(options))


def _spare_the_prior(options: Options) -> None:
    """Raises `ConfigError` where more updates would change the codes that a prior was begun on."""
    folder, prior = options.run / "dvae", options.run / "prior"
    if held(prior):
        raise ConfigError(f"{prior} is being trained on this dVAE: wait for it, or use another --run")
    if not begun(prior):
        return
    if not begun(folder):
        raise ConfigError(
            f"{prior} was begun on a dVAE that {folder} no longer holds: put it back, or use another --run"
        )
    made, steps = _progress(options)
    if made < steps or options.minutes is not None:
        later = f"{steps:,}" if made < steps else "more"
        raise ConfigError(
            f"{prior} was begun on this dVAE as it is after {made:,} steps, and would not fit it "
            f"after {later}: use another --run"
        )


def check_settled(run: Path) -> None:
    """Before a prior is begun on the dVAE of a run: warn if that was stopped early.

    Raises:
        ConfigError: it is being trained, and would be another model afterwards.
    """
    folder = run / "dvae"
    if held(folder):
        raise ConfigError(f"{folder} is being trained: wait until that has ended, or use another --run")
    if not state_folders(folder / "state"):
        return  # imported, or handed on without its training
    made, steps = _progress(Options(run))
    if made < steps:
        warn(
            f"{folder} was stopped after {made:,} of {steps:,} steps, and is used as it is: it cannot be "
            "trained on once a prior is begun on it"
        )


def _progress(options: Options) -> tuple[int, int]:
    """The updates made so far, and those there are to be."""
    return newest_step(options.run / "dvae" / "state"), resolve(options).training.steps


def prepare(options: Options) -> Session:
    """All that trains the dVAE of a run; see `train`."""
    suit_computing()
    run = resolve(options)
    config: DVAETraining = run.training
    size = run.model.image_size
    device, here = best_device(), topology()
    precision = precision_of(config)

    source, unseen = run.sources(size)
    crop = partial(_crop, size=size, flip=config.flip)
    loader = make_loader(source, crop, config, size)
    centre = partial(_centre, size=size)
    unseen_loader = Loader(unseen, centre, batch_size=1, seed=HELDOUT_SEED, min_side=size)
    (heldout,) = unseen_loader.some(config.eval_pictures)
    loader.skipped |= unseen_loader.skipped

    model = build(lambda: DVAE(run.model), config)
    if config.start == "patches" and not state_folders(run.folder / "state"):
        say("dVAE: clustering patches for a start")
        centred = Loader(source, centre, batch_size=1, seed=config.seed, min_side=size)
        needed = min(pictures_needed(run.model), len(source))
        with Bar("dVAE: pictures to cluster", needed, unit="pictures") as bar:
            (some,) = centred.some(needed, bar.show)
            if len(some) < needed:  # the others could not be read
                bar.expect(len(some))
                bar.show(len(some))
        loader.skipped |= centred.skipped
        with whole(model.parameters()):
            start_from_patches(model, to_pixels(some), config.seed)
    to_device(model, config, torch.channels_last)  # faster everywhere
    model.share_out()
    if config.recompute:
        model.recompute()
    engine = make_engine(model, config, precision)
    say(
        f"dVAE: {run.folder} · preset {run.preset} · {parameter_count(model):,} parameters · "
        f"{size}×{size} pixels ↔ {run.model.grid}×{run.model.grid} codes of {run.model.vocab_size:,} · "
        f"{len(source):,} pictures of {run.data} · {device.type} {precision}{processes_used(config)}"
    )
    stage = Stage1(model, run, heldout.to(device))
    return Session(stage, engine, loader, run.folder, here, run.budget(), run.write)


def _crop(sample: Sample, rng: np.random.Generator, size: int, flip: bool) -> tuple[Tensor]:
    return (torch.from_numpy(stage1_crop(sample.image, size, rng, flip=flip)),)


def _centre(sample: Sample, _: np.random.Generator, size: int) -> tuple[Tensor]:
    return (torch.from_numpy(centre_crop(sample.image, size)),)


class Stage1:
    """What the loop asks of stage 1; see `dalle.training.Task`."""

    label = "dVAE"

    def __init__(self, model: DVAE, run: StageRun, heldout: Tensor) -> None:
        self.model, self.run, self.heldout = model, run, heldout
        self.config: DVAETraining = run.training
        self.tokens_per_picture = run.model.grid**2
        counted = model
        if partitioned(self.config):  # a partitioned model cannot run outside of its engine
            with torch.device("meta"):
                counted = DVAE(run.model)
        self.flops_per_picture = 3 * matrix_flops(counted)  # the backward pass takes twice the forward's
        self.window = CodebookWindow(run.model.vocab_size, heldout.device)
        self.posterior: Tensor | None = None  # mean over a batch that is seen in parts
        self.alarms = 0

    def beta(self, step: int) -> float:
        """The KL term's weight."""
        return cosine(step, self.config.beta_steps, self.config.beta_start, self.config.beta)

    def tau(self, step: int) -> float:
        """The relaxation's temperature."""
        return cosine(step, self.config.tau_steps, self.config.tau_start, self.config.tau)

    def lr(self, step: int) -> float:
        """The step size."""
        c = self.config
        return warmup(step, c.warmup) * cosine(step, c.lr_steps, c.lr, c.lr_end)

    def begin(self, batches: Sequence[Batch], run: Callable[..., Any]) -> None:
        """The mean posterior of the whole batch, where it counts and is seen only in parts."""
        self.posterior = None
        if self.config.usage_weight and len(batches) > 1:
            means = [run(self._mean_of, pixels) for (pixels,) in batches]
            self.posterior = self._over_processes(torch.stack(means).mean(0))

    @torch.no_grad()
    def _mean_of(self, pixels: Tensor) -> Tensor:
        def of_some(pixels: Tensor) -> Tensor:
            return self.model.logits(pixels).float().softmax(1).mean((2, 3))

        return self.model.threads.apply(of_some, to_pixels(pixels)).mean(0)

    def _over_processes(self, mean: Tensor) -> Tensor:
        return (topology().sum(mean) / topology().world).to(mean.device)

    def _mean_posterior(self, part: Tensor) -> Tensor:
        return self._over_processes(part) if self.posterior is None else self.posterior

    def loss(self, batch: Batch, step: int, positions: range) -> tuple[Tensor, dict[str, Tensor]]:
        """`Elbo.loss` of one micro-batch, under the schedules' beta and tau."""
        noise = [noise_of(self.heldout.device, self.config.seed, position) for position in positions]
        tau, beta = self.tau(step), self.beta(step)
        in_parts = self.config.usage_weight and (self.posterior is not None or topology().world > 1)
        terms, codes, _ = elbo(
            self.model, to_pixels(batch[0]), tau=tau, generators=noise,
            mean_posterior=self._mean_posterior if in_parts else None,
        )  # fmt: skip
        self.window.add(codes)
        schedule = {"tau": torch.tensor(tau), "beta": torch.tensor(beta)}
        metrics = {**terms.metrics(), **self.window.metrics(), **schedule}
        return terms.loss(beta, self.config.usage_weight), metrics

    def after(self, loss: float) -> None:
        """The schedules of stage 1 do not depend on the loss."""

    @fp32_products("ieee")
    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out ELBO; relaxed against hard reconstructions; a grid of both in pictures/.

        `heldout_loss` is without the usage term, which is a whole batch's.

        The two fp32 layers beside the codes multiply their operands as they are, as when pictures are read
        later (`DVAE.encode`), also where training in bf16 rounds them. The resblocks run as in training.
        """
        sums: dict[str, float] = {}
        window = CodebookWindow(self.run.model.vocab_size, self.heldout.device)
        at_once = min(AT_ONCE, self.config.pictures_at_once(topology().world))
        for start in range(0, len(self.heldout), at_once):
            pixels = to_pixels(self.heldout[start : start + at_once])
            places = range(start, start + len(pixels))
            noise = [noise_of(pixels.device, self.config.seed, EVALUATION, place) for place in places]
            terms, codes, relaxed = elbo(self.model, pixels, tau=self.tau(step), generators=noise)
            hard = self.model.decoder.look_up(codes).float()
            hard_nll = -log_likelihood(pixels, hard, self.run.model.pixel_std).mean()
            window.add(codes)
            measured = {
                "loss": terms.loss(self.beta(step)),
                **terms.metrics(),
                "relaxed_psnr": psnr(pixels, reconstruction(relaxed)).mean(),
                "psnr": psnr(pixels, reconstruction(hard)).mean(),
                "relaxation_gap": hard_nll - terms.nll,  # nats per subpixel that hard codes cost
            }
            for name, value in measured.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(pixels) / len(self.heldout)
            if start == 0 and topology().main:
                rows = [to_images(p[:SHOWN]) for p in (pixels, reconstruction(relaxed), reconstruction(hard))]
                save_png(self.run.folder / "pictures" / f"step-{step:08d}.png", grid(rows))
        sums |= {name: float(value) for name, value in window.metrics().items()}
        metrics = {f"heldout_{name}": value for name, value in sums.items()}
        say(
            f"dVAE: step {step:,} · held-out {metrics['heldout_bits_per_dim']:.3f} bits/dim "
            f"(reconstruction {metrics['heldout_reconstruction_nats']:,.0f} nats, "
            f"KL {metrics['heldout_kl_nats']:,.0f}) · "
            f"PSNR {metrics['heldout_psnr']:.1f} dB hard, {metrics['heldout_relaxed_psnr']:.1f} relaxed · "
            f"codes in use {metrics['heldout_codebook_usage']:.0%}, "
            f"perplexity {metrics['heldout_codebook_perplexity']:.0f}"
        )
        self._warn_of_collapse()
        return metrics

    def _warn_of_collapse(self) -> None:
        usage = float(self.window.metrics()["codebook_usage"])
        self.alarms = self.alarms + 1 if self.window.full and usage < ALARM else 0
        if self.alarms >= 2:
            warn(
                f"only {usage:.1%} of the codes were in use lately, the codebook is dying: start anew with "
                "--set start=patches (with one group and a patch), a larger usage_weight, or a smaller lr"
            )

    def state(self) -> dict[str, Any]:
        """Nothing beyond the step: schedules are functions of it, noise is keyed by it."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """See `state`."""


def psnr(pixels: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, `b 3 h w` → `b`."""
    return -10 * (pixels - other).square().mean((1, 2, 3)).clamp_min(1e-10).log10()
