"""The dVAE's training step beside its plain form, and beside its networks alone; in turn, in one process.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.dvae [--rounds 7]

A whole step is noise, both networks, likelihood, gradients, clipping, AdamW and the average. The plain form
is what one writes down first: channels first, `F.gumbel_softmax` over the channels, torch's threads inside of
every operation, `torch.optim.AdamW` as it comes, an average parameter by parameter. The networks alone are
ours, without noise, likelihood or optimizer.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from dalle.engine import Engine
from dalle.noise import noise_of
from dalle.optim import AdamW, Average
from dalle.precision import arithmetic, best_device, choose, products
from dalle.process import suit_computing
from stage1_dvae.config import PRESETS, DVAEConfig
from stage1_dvae.likelihood import log_likelihood
from stage1_dvae.loss import elbo
from stage1_dvae.model import DVAE

SHAPES: dict[str, tuple[DVAEConfig, int]] = {
    "the tiny preset": (PRESETS["tiny"][0], 16),
    "64 pixels in 8×8 of 2,048, four groups of 64": (
        DVAEConfig(image_size=64, vocab_size=2048, hidden=64, codebook_width=128, blocks_per_group=1), 16,
    ),
    "the small preset": (PRESETS["small"][0], 8),
}  # fmt: skip
BETAS, DECAY, CLIP, TAU, BETA = (0.9, 0.999), 1e-4, 1.0, 1.0, 1.0


def ours(model: DVAE, pixels: torch.Tensor) -> Callable[[], None]:
    """A step as `dalle train-dvae` makes it."""
    precision, device = choose("auto", pixels.device), pixels.device
    optimizer = AdamW(model, betas=BETAS, weight_decay=DECAY)
    average = Average(model.parameters(), 0.999, 1)
    engine = Engine(model, optimizer, average, clip=CLIP, precision=precision)
    generators = [noise_of(device, i) for i in range(len(pixels))]

    def step() -> None:
        with engine.arithmetic():
            terms, _, _ = elbo(model, pixels, tau=TAU, generators=generators)
        engine.backward(terms.loss(BETA), 1)
        engine.update(1e-4, 1)

    return step


def plain(model: DVAE, pixels: torch.Tensor) -> Callable[[], None]:
    """The same mathematics, written down without a thought for speed, in fp32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=BETAS, weight_decay=DECAY)
    average = [p.detach().clone() for p in model.parameters()]

    def step() -> None:
        logits = model.logits(pixels)
        decoded = model.decoder(F.gumbel_softmax(logits, TAU, dim=1))
        log_q = F.log_softmax(logits, dim=1)
        uniform = torch.tensor(1 / log_q.shape[1], device=log_q.device).log()
        kl = F.kl_div(uniform, log_q, reduction="none", log_target=True).sum(1).mean()
        nll = -log_likelihood(pixels, decoded, model.config.pixel_std).mean()
        (nll + BETA * kl / 192).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, p in zip(average, model.parameters(), strict=True):
                mean.lerp_(p, 1e-3)

    return step


def networks(model: DVAE, pixels: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of encoder and decoder, nothing between or behind them."""
    precision, device = choose("auto", pixels.device), pixels.device

    parameters = list(model.parameters())

    def of_some(pixels: torch.Tensor) -> torch.Tensor:
        return model.decoder(model.logits(pixels)).float().mean((1, 2, 3))

    def step() -> None:
        with arithmetic(precision, device):
            y = model.threads.apply(of_some, pixels, parameters=parameters)
        with products(precision, device):
            y.mean().backward()
        for p in parameters:
            p.grad = None

    return step


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    suit_computing()
    device = best_device()
    print(f"{device}, {torch.get_num_threads()} threads, ours in {choose('auto', device)}")
    print("| | ours | plain | faster by | networks alone | share of their speed |")
    print("|---|---|---|---|---|---|")
    for name, (config, batch) in SHAPES.items():
        torch.manual_seed(0)
        simple = DVAE(config).to(device)
        fast = copy.deepcopy(simple).for_speed()
        pixels = torch.rand(batch, 3, config.image_size, config.image_size, device=device)
        bare = copy.deepcopy(simple).for_speed()
        steps = {
            "ours": ours(fast, pixels),
            "plain": plain(simple, pixels),
            "networks": networks(bare, pixels),
        }
        times: dict[str, list[float]] = {each: [] for each in steps}
        for turn in range(rounds + 2):  # two warm up
            for each, step in steps.items():
                began = time.perf_counter()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn > 1:
                    times[each].append(time.perf_counter() - began)
        took = {each: median(values) for each, values in times.items()}
        print(
            f"| {name}, batch {batch} | {1e3 * took['ours']:.0f} ms | {1e3 * took['plain']:.0f} ms "
            f"| {took['plain'] / took['ours']:.2f} | {1e3 * took['networks']:.0f} ms "
            f"| {took['networks'] / took['ours']:.0%} |"
        )


if __name__ == "__main__":
    main()
