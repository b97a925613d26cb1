"""A model whose late resblocks' gradients underflow in fp16, trained in three ways: docs/fp16.svg.

    python -m benchmarks.underflow docs/fp16.svg

The layers are the prior's own. Behind each a frozen head reads the residual stream, and the layer is to learn
a permutation of the tokens; a quarter of the answers are noise. Each layer has its own task. The losses
are weighted from 2^10 for the first layer to 2^-28 for the last: gradients fall with depth, as in the
paper's large models, and so far that fp16 cannot hold them all under one scale. AdamW does not mind the size
of gradients (its epsilon is set to 1e-30 here): in fp32 every layer learns equally fast.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.audit import count, own_scale
from dalle.boundary import residual
from dalle.chart import COLOURS, Curve, svg
from dalle.engine import Engine
from dalle.optim import AdamW, Average
from dalle.scaling import Scaling
from stage2_prior.config import PriorConfig
from stage2_prior.model import Layer

FIRST, LAST = 10, -28  # log2 of the weights of the first and the last layer's loss
CONFIG = PriorConfig(
    text_length=4, text_vocab=16, image_vocab=16, grid=4, depth=4, width=32, heads=2, kernel=3
)
NOISE = 0.25  # share of the answers that are random
LR = 3e-3
WINDOW = 10  # updates that a point of the figure stands for


class Ladder(nn.Module):
    """Layers of the prior, each with a task of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width, vocab, depth = CONFIG.width, CONFIG.image_vocab, CONFIG.depth
        self.layers = nn.ModuleList(Layer(CONFIG, "row") for _ in range(depth))
        self.register_buffer("tokens", torch.randn(vocab, width))
        self.register_buffer("heads", torch.randn(depth, vocab, width) / width**0.5)
        self.register_buffer("tasks", torch.stack([torch.randperm(vocab) for _ in range(depth)]))
        self.register_buffer("weights", 2.0 ** torch.linspace(FIRST, LAST, depth))

    def resblocks(self) -> dict[str, tuple[nn.Module, nn.Module]]:
        """The two of every layer."""
        return {
            f"layers.{i}.{branch}": (getattr(layer, f"{branch}_norm"), getattr(layer, branch))
            for i, layer in enumerate(self.layers)
            for branch in ("attention", "mlp")
        }

    def forward(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """The loss of every layer, unweighted; noise is an answer in place of the right one, or −1."""
        x, losses = self.tokens[tokens], []
        for layer, head, task in zip(self.layers, self.heads, self.tasks, strict=True):
            x = residual(x, layer.attention_norm, layer.attention)
            x = residual(x, layer.mlp_norm, layer.mlp)
            with torch.autocast(x.device.type, enabled=False):
                logits = F.layer_norm(x, x.shape[-1:]) @ head.t()
                answers = torch.where(noise < 0, task[tokens], noise)
                losses.append(F.cross_entropy(logits.flatten(0, 1), answers.flatten()))
        return torch.stack(losses)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Random tokens and noise, the same for the same step."""
    random = torch.Generator().manual_seed(step)
    tokens, noise = torch.randint(CONFIG.image_vocab, (2, 16, CONFIG.text_length), generator=random)
    return tokens, torch.where(torch.rand(noise.shape, generator=random) < NOISE, noise, -1)


def optimizer_of(model: nn.Module) -> AdamW:
    """The prior's optimizer without its floor under the size of gradients."""
    optimizer = AdamW(model, betas=(0.9, 0.96), weight_decay=0.0)
    for group in optimizer.param_groups:
        group["eps"] = 1e-30
    return optimizer


def fp32(steps: int) -> Tensor:
    """Losses of every layer at every update, `steps × depth`."""
    return _with_engine(Ladder(), "fp32", None, steps)


def scale_for_each(steps: int) -> Tensor:
    """The same in fp16 with the paper's scales."""
    model = Ladder()
    found = count(model.resblocks(), [lambda: (model(*batch(0)) * model.weights).sum()])
    scaling = Scaling(model)
    # Where they would settle: from 2^13 they would come there by 2^(1/1000) an update.
    scaling.rule.scales = [2.0 ** (own_scale(resblock) - 1) for resblock in found.values()]
    scaling.apply()
    return _with_engine(model, "fp16", scaling, steps)


def _with_engine(model: Ladder, precision: str, scaling: Scaling | None, steps: int) -> Tensor:
    average = Average(model.parameters(), 0.9, 1)
    engine = Engine(model, optimizer_of(model), average, clip=None, precision=precision, scaling=scaling)

    def update(loss: Tensor, step: int) -> None:
        engine.backward(loss, 1)
        engine.update(LR, step + 1)

    return _train(model, precision, update, steps)


def one_scale(steps: int) -> Tensor:
    """The same in fp16 with torch's autocast and gradient scaler: one scale, as large as it can be."""
    model = Ladder()
    optimizer = optimizer_of(model)
    for group in optimizer.param_groups:
        group["lr"] = LR
    scaler = torch.amp.GradScaler("cpu", growth_interval=20)  # it looks often how far it can go

    def update(loss: Tensor, step: int) -> None:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return _train(model, "fp16", update, steps)


def _train(model: Ladder, precision: str, update: Callable[[Tensor, int], None], steps: int) -> Tensor:
    seen = []
    for step in range(steps):
        with torch.autocast("cpu", torch.float16, enabled=precision == "fp16"):
            losses = model(*batch(step))
        update((losses * model.weights).sum(), step)
        seen.append(losses.detach())
    return torch.stack(seen)


WAYS = {"fp32": fp32, "fp16, a scale for each resblock": scale_for_each, "fp16, one scale": one_scale}


def main(path: Path, steps: int = 600) -> None:
    """Train in the three ways, print the last losses, draw those of the last layer."""
    torch.set_num_threads(1)
    found = {name: train(steps) for name, train in WAYS.items()}
    print(f"loss of each layer after {steps} updates, nats (mean of the last 20)")
    for name, losses in found.items():
        print(f"  {name:32}", "  ".join(f"{x:.4f}" for x in losses[-20:].mean(0)))
    drawn = []
    for (name, losses), colour in zip(found.items(), COLOURS, strict=False):
        means = losses[:, -1].split(WINDOW)
        points = [((i + 1) * WINDOW, part.mean().item()) for i, part in enumerate(means)]
        drawn.append(Curve(points, name, colour, width=5 if name == "fp32" else 1.6))  # one lies on it
    title = f"Loss of the last layer, nats (means of {WINDOW} updates)"
    path.write_text(svg(drawn, title, width=560, height=260))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
